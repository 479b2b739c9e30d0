"""A process that has imported what takes two seconds, and forks for each program that the tests run.

Reads a line of JSON for each: folder, script, args, out, err, timeout. Answers with its exit status.
"""

import gc
import json
import os
import runpy
import signal
import sys

import numpy  # noqa: F401
import torch._dynamo  # noqa: F401 (Adam's first step would)

gc.freeze()  # no child copies it to look at it
for line in sys.stdin:
    asked = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

signal.alarm(asked["timeout"])
for fd, path in enumerate((os.devnull, asked["out"], asked["err"])):
    os.dup2(os.open(path, os.O_WRONLY if fd else os.O_RDONLY), fd)
os.chdir(asked["folder"])
sys.argv = [asked["script"], *asked["args"]]
if asked["script"] == "-c":
    sys.path[0] = ""
    exec(sys.argv.pop(1), {"__name__": "__main__"})
else:
    sys.path[0] = os.path.dirname(os.path.abspath(asked["script"]))
    runpy.run_path(asked["script"], run_name="__main__")
