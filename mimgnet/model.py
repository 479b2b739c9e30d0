"""The networks of Meta-GMVAE for features, its objective and its prediction; mixture.py has the mathematics.

Symbols: B sets (or episodes), M images of a set, S Monte-Carlo samples of an image, D latent size, K
components.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from machine import UserError, in_short
from mixture import classify, fit_prior, log_posterior, log_prior, sample_posterior
from runtime import load_checkpoint


class SetAttention(nn.Module):
    """Self-attention over the members of a set, without layer norm: (B, M, width) -> the same.

    h = q + softmax(q k^T / sqrt(width)) v in 4 heads, or as many as divide the width; out = h + relu(W h).
    The residual adds the projected query and the scale is the full width's, not a head's, as in the released
    code.
    """

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = math.gcd(heads, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, M, width = x.shape
        # Each (B, heads, M, width / heads). Sets are short: faster than torch's fused attention on a CPU.
        q, k, v = self.qkv(x).view(B, M, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = q + (q * width**-0.5 @ k.mT).softmax(-1) @ v
        h = h.transpose(1, 2).reshape(B, M, width)
        return h + self.out(h).relu()


class GMVAE(nn.Module):
    """Set network and decoder for features of any width; no image encoder.

    Nothing here depends on the number of components. With bf16, set network and decoder run under
    autocast; everything the mixture sees is float32. `signed`: features may be below zero.
    """

    def __init__(
        self, feature_size, hidden_size=512, latent_size=32, set_attention=True, bf16=False, signed=False
    ):
        super().__init__()
        width = feature_size
        # `load_model` passes these to this constructor and no others: an argument added there belongs here.
        self.sizes = {"feature_size": feature_size, "hidden_size": hidden_size, "latent_size": latent_size}
        self.sizes |= {"set_attention": set_attention, "signed": signed}
        self.bf16 = bf16
        self.set_network = nn.Sequential(
            SetAttention(width), SetAttention(width), nn.Linear(width, 2 * latent_size)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, width), nn.Identity() if signed else nn.ReLU(),  # as the encoder ends
        )  # fmt: skip

    def autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)

    def encode(self, x):
        """Return the features as they are: they are the encoding."""
        return x

    def posterior(self, h):
        """Return q(z_i | x_i, X) of each member: features (B, M, width) -> mean, log variance (B, M, D).

        Without set attention it is q(z_i | x_i): every image is a set of its own. The last linear map is
        always float32: bfloat16 would round a latent to three digits.
        """
        sets = h if self.sizes["set_attention"] else h.flatten(0, 1).unsqueeze(1)
        *attention, linear = self.set_network
        with self.autocast(h):
            for block in attention:
                sets = block(sets)
        return linear(sets.float()).view(*h.shape[:2], -1).chunk(2, dim=-1)

    def decode(self, z):
        """Decode latents (N, D) -> features (N, width), float32, >= 0 unless signed."""
        with self.autocast(z):
            return self.decoder(z).float()

    def forward(
        self, x, samples, components, em_iters, fix_pi=False, generator=None, start="samples", decoded=None
    ):
        """Return both terms of the negative evidence lower bound per image; minimise their sum.

        x (B, M, width) -> (-E log p(x|z), E[log q(z|x,X) - log p_psi*(z)]), means over images and Monte-Carlo
        samples. -log p(x|z) is the squared error summed over features (no 1/2, no constant: a Gaussian of
        variance 1/2). psi* is fitted here to the sets' own samples and carries no gradient. Only
        `decoded` samples per image, drawn anew, pass the decoder (None: all): an unbiased estimate.
        """
        B, M = x.shape[:2]
        mean, log_var = self.posterior(x)
        noise = torch.randn(B, M, samples, mean.shape[-1], device=x.device, generator=generator)
        z = sample_posterior(mean, log_var, noise)  # (B, M, S, D)
        pi, mu = fit_prior(z.detach(), components, em_iters, fix_pi, generator, start)
        kl = log_posterior(log_var, noise).mean() - log_prior(z.flatten(1, 2), pi, mu).mean()
        if decoded not in (None, samples):
            chosen = torch.rand(B, M, samples, device=x.device, generator=generator).topk(decoded).indices
            z = z.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, z.shape[-1]))
        y = self.decode(z.flatten(0, 2)).view(B, M, z.shape[2], -1)
        squared_error = F.mse_loss(y, x.unsqueeze(2).expand_as(y), reduction="sum")
        return squared_error / (B * M * z.shape[2]), kl

    @torch.no_grad()
    def predict_encoded(self, h, way, shot, noise, em_iters=10, reading="unit"):
        """Classify the query images of episodes from features: `classify` on samples of the posterior.

        h (B, way shot + Q, width), the support first, class by class; noise (B, way shot + Q, S, D) ->
        probabilities (B, Q, way). Support and query pass the set network together (transductive).
        """
        mean, log_var = self.posterior(h)
        z = sample_posterior(mean, log_var, noise)
        support, query = z[:, : way * shot], z[:, way * shot :]
        return classify(support.unflatten(1, (way, shot)), query, em_iters, reading)

    @torch.no_grad()
    def predict(self, support, query, samples=256, em_iters=10, reading="unit", seed=0):
        """Classify query features given a few labeled ones of each class; needs evaluation mode.

        support (way, shot, width), query (N, width) -> probabilities (N, way). The queries are classified
        together (transductive); em_iters=0 leaves out EM on them. `seed` draws the Monte-Carlo samples.
        """
        way, shot = support.shape[:2]
        h = self.encode(torch.cat([support.flatten(0, 1), query]))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(h), samples, self.sizes["latent_size"], generator=generator).to(h.device)
        return self.predict_encoded(h[None], way, shot, noise[None], em_iters, reading)[0]


def load_model(path):
    """Load a trained model, in evaluation mode: a checkpoint's weights, or their average if it has one.

    Raises UserError.
    """
    checkpoint = load_checkpoint(path)
    try:
        weights = checkpoint.get("average") or checkpoint["model"]
        model = GMVAE(**checkpoint["sizes"])
        model.load_state_dict(weights)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of this experiment ({in_short(error)})") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: weights that are NaN or infinite found, finite ones expected")
    return model.eval()
