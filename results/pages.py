"""Lay out tables in Markdown and put them into a page."""

START, END = "<!-- {}: made by `make table` -->", "<!-- end of {} -->"  # around each named table


def grid(header, rows):
    """Lay out a table in Markdown."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def filled(text, tables):
    """Put tables, {name: content}, between their marks in a README."""
    for name, content in tables.items():
        start, end = START.format(name), END.format(name)
        before, rest = text.split(start)
        text = f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
    return text
