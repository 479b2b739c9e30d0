"""The networks of Meta-GMVAE for images, its objective and its prediction; mixture.py has the mathematics.

Symbols: B sets (or episodes), M images of a set, S Monte-Carlo samples of an image, D latent size, K
components.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from blocks import PoolReLU, first_block, frozen_bias
from layers import ConvTranspose
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


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, 2x2 max-pool (ceil mode), ReLU.

    Max-pool and ReLU commute; pooling first leaves the ReLU and its gradient a quarter of the pixels.
    """

    def __init__(self, channels_in, channels):
        super().__init__()
        self.conv = frozen_bias(nn.Conv2d(channels_in, channels, 3, padding=1))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        if not (self.training and x.device.type == "cpu"):
            return F.max_pool2d(self.norm(self.conv(x)), 2, ceil_mode=True).relu()
        # The same function, faster in training on a CPU: a block that you change has to leave this out.
        odd = x.shape[3] % 2, x.shape[2] % 2
        if x.requires_grad or any(odd):  # zero padding is harmless: a ReLU follows
            return PoolReLU.apply(F.pad(self.norm(self.conv(x)), (0, odd[0], 0, odd[1])))
        return first_block(x, self.conv, self.norm)


def up_block(channels, kernel_size):
    """Return the layers of a decoder's block: transposed convolution, batch norm, ReLU."""
    conv = frozen_bias(ConvTranspose(channels, channels, kernel_size))
    return conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)


class GMVAE(nn.Module):
    """Encoder, set network and decoder for 28x28 images; 988,929 parameters at the defaults.

    Nothing here depends on the number of components. With bf16, encoder, set network and decoder run
    under autocast; everything the mixture sees is float32.
    """

    def __init__(self, hidden_size=64, latent_size=64, set_attention=True, bf16=False):
        super().__init__()
        c, width = hidden_size, 4 * hidden_size
        # `load_model` passes these to this constructor and no others: an argument added there belongs here.
        self.sizes = {"hidden_size": hidden_size, "latent_size": latent_size, "set_attention": set_attention}
        self.bf16 = bf16
        self.encoder = nn.Sequential(
            ConvBlock(1, c), ConvBlock(c, c), ConvBlock(c, c), ConvBlock(c, c), nn.Flatten()
        )
        self.set_network = nn.Sequential(
            SetAttention(width), SetAttention(width), nn.Linear(width, 2 * latent_size)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, width), nn.ELU(),
            nn.Linear(width, width), nn.ELU(),
            nn.Linear(width, width), nn.ELU(),
            nn.Unflatten(1, (c, 2, 2)),
            *up_block(c, 4),  # 4x4
            *up_block(c, 3),  # 7x7
            *up_block(c, 4),  # 14x14
            ConvTranspose(c, 1, 4),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)

    def encode(self, x):
        """Encode images alone: (N, 28, 28, 1), float in [0, 1] or bytes -> features (N, 4 * hidden_size)."""
        x = x / 255 if x.dtype == torch.uint8 else x
        with self.autocast(x):
            return self.encoder(x.permute(0, 3, 1, 2))

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
        """Decode latents (N, D) -> Bernoulli logits of the pixels (N, 28, 28, 1), float32.

        figures.py draws their sigmoid.
        """
        with self.autocast(z):
            return self.decoder(z).float().permute(0, 2, 3, 1)

    def forward(self, x, samples, components, em_iters, fix_pi=False, generator=None, start="samples",
                decoded=None, target=None):  # fmt: skip
        """Return both terms of the negative evidence lower bound, in nats an image; minimise their sum.

        x (B, M, 28, 28, 1) float in [0, 1] -> (-E log p(x|z), E[log q(z|x,X) - log p_psi*(z)]), means over
        images and Monte-Carlo samples. psi* is fitted here to the sets' own samples and carries no
        gradient. Only `decoded` samples per image, drawn anew, pass the decoder (None: all): an unbiased
        estimate of the first term, except for batch norm's statistics. The decoder learns `target`, of x's
        shape (None: x itself).
        """
        B, M = x.shape[:2]
        mean, log_var = self.posterior(self.encode(x.flatten(0, 1)).view(B, M, -1))
        noise = torch.randn(B, M, samples, mean.shape[-1], device=x.device, generator=generator)
        z = sample_posterior(mean, log_var, noise)  # (B, M, S, D)
        pi, mu = fit_prior(z.detach(), components, em_iters, fix_pi, generator, start)
        kl = log_posterior(log_var, noise).mean() - log_prior(z.flatten(1, 2), pi, mu).mean()
        if decoded not in (None, samples):
            chosen = torch.rand(B, M, samples, device=x.device, generator=generator).topk(decoded).indices
            z = z.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, z.shape[-1]))
        logits = self.decode(z.flatten(0, 2)).view(B * M, z.shape[2], -1)  # (B M, samples, pixels)
        # Binary cross-entropy on logits is softplus(l) - x l; the second term needs no copy of x for every
        # sample.
        x = (x if target is None else target).view(B * M, -1)  # (B M, pixels)
        bce = F.softplus(logits).sum() - (logits.sum(1) * x).sum()
        return bce / (B * M * z.shape[2]), kl

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
    def predict(self, support, query, samples=32, em_iters=10, reading="unit", seed=0):
        """Classify query images given a few labeled ones of each class; needs evaluation mode.

        support (way, shot, 28, 28, 1), query (N, 28, 28, 1), uint8 or float32 in [0, 1], ink high ->
        probabilities (N, way). The queries are classified together (transductive); em_iters=0 leaves out EM
        on them. `reading` is the --e-step of the run. `seed` draws the Monte-Carlo samples. Raises UserError
        for other values and for inverted images, which would spoil all answers of the call.
        """
        for name, x in (("support", support), ("query", query)):
            top = 255 if x.dtype == torch.uint8 else 1
            mean = x.float().mean() / top
            if not (x.min() >= 0 and x.max() <= top and mean < 0.55):
                found = f"values from {x.min()} to {x.max()} with mean {mean:.2f} found"
                raise UserError(f"{name}: {found}, ink {top} on a ground of 0 expected")
        way, shot = support.shape[:2]
        h = torch.cat([self.encode(support.flatten(0, 1)), self.encode(query)])
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
