"""Makes a small Stable Diffusion, two fine-tunes of it, and items, in this folder, for examples/image.yaml.

    python examples/diffusers/make.py

This takes half a minute on a processor. The base has barely learned to draw blots of four colours; each fine-tune
continues with two of them and forgets the others.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

logging.set_verbosity_error()  # diffusers imports image processors that are not used

HERE = Path(__file__).parent
COLOURS = {"red": (0.9, 0.1, 0.1), "yellow": (0.9, 0.8, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.9)}
FINE_TUNES = {"warm": ["red", "yellow"], "cool": ["green", "blue"]}
SIZE, LATENT, WORDS = 16, 8, 6
"""The side of a picture in pixels, the side of a latent picture, and the tokens of a prompt."""

BATCH = 12


def prompt_of(colour: str) -> str:
    return f"a {colour} blot"


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, with one token for each word of the prompts."""
    words = {word for colour in COLOURS for word in prompt_of(colour).split()}
    vocabulary = dict.fromkeys(["<|startoftext|>", "<|endoftext|>"], 0)
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        vocabulary |= dict.fromkeys([*word, *letters], 0)
        for end in range(1, len(letters)):
            pair = ("".join(letters[:end]), letters[end])
            if pair not in merges:
                merges.append(pair)
            vocabulary["".join(pair)] = 0
    numbered = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbered, merges=merges, model_max_length=WORDS)


def pipeline() -> StableDiffusionPipeline:
    """A Stable Diffusion with a quarter of a million random weights."""
    tokens = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=WORDS, eos_token_id=tokens.eos_token_id, bos_token_id=tokens.bos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=LATENT, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    noise = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type="v_prediction"
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokens, unet=unet, scheduler=noise, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def blots(colours: list[Tensor], random: torch.Generator) -> Tensor:
    """Pictures of one round blot of each colour on grey: float32 [count, 3, size, size], from -1 to 1."""
    places = 0.3 + 0.4 * torch.rand(len(colours), 2, 1, 1, generator=random)
    across = torch.linspace(0, 1, SIZE)
    distance = ((across - places[:, 0]) ** 2 + (across[:, None] - places[:, 1]) ** 2).sqrt()
    inside = torch.sigmoid(40 * (0.28 - distance))[:, None]
    return 2 * (inside * torch.stack(colours)[:, :, None, None] + (1 - inside) * 0.5) - 1


def learn_to_see(vae: AutoencoderKL, steps: int) -> None:
    """Train the autoencoder on blots of any colour."""
    random, adam = torch.Generator().manual_seed(1), torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(steps):
        pictures = blots([*torch.rand(BATCH, 3, generator=random)], random)
        latents = vae.encode(pictures).latent_dist
        loss = mse_loss(vae.decode(latents.sample(random)).sample, pictures) + 1e-4 * latents.kl().mean()
        step(adam, loss)


def learn_to_draw(model: StableDiffusionPipeline, colours: list[str], steps: int, seed: int) -> None:
    """Train UNet and text encoder on prompts for these colours."""
    random = torch.Generator().manual_seed(seed)
    parts = itertools.chain(model.unet.parameters(), model.text_encoder.parameters())
    adam = torch.optim.Adam(parts, lr=4e-3)
    for _ in range(steps):
        names = [colours[number] for number in torch.randint(len(colours), (BATCH,), generator=random)]
        with torch.no_grad():
            latents = model.vae.encode(blots([torch.tensor(COLOURS[name]) for name in names], random)).latent_dist.mean
            latents = latents * model.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=random)
        times = torch.randint(model.scheduler.config.num_train_timesteps, (BATCH,), generator=random)
        noisy = model.scheduler.add_noise(latents, noise, times)
        asked = model.tokenizer(list(map(prompt_of, names)), padding="max_length", return_tensors="pt").input_ids
        predicted = model.unet(noisy, times, model.text_encoder(asked)[0]).sample
        step(adam, mse_loss(predicted, model.scheduler.get_velocity(latents, noise, times)))


def step(adam: torch.optim.Adam, loss: Tensor) -> None:
    adam.zero_grad()
    loss.backward()
    adam.step()


def make(see: int = 160, draw: int = 160, go_on: int = 100, seeds: int = 8) -> None:
    """Make the models and the items.

    Args:
        see: steps of the autoencoder.
        draw: steps of the base.
        go_on: further steps of each fine-tune.
        seeds: how many noises each prompt is drawn from.
    """
    torch.manual_seed(0)
    model = pipeline()
    learn_to_see(model.vae, see)
    with torch.no_grad():
        spread = model.vae.encode(blots([*torch.rand(256, 3)], torch.Generator().manual_seed(2))).latent_dist.mean.std()
    model.vae.register_to_config(scaling_factor=1 / float(spread))
    learn_to_draw(model, [*COLOURS], draw, seed=3)
    model.save_pretrained(HERE / "base")
    for name, colours in FINE_TUNES.items():
        fine_tune = StableDiffusionPipeline.from_pretrained(HERE / "base", local_files_only=True)
        learn_to_draw(fine_tune, colours, go_on, seed=4)
        fine_tune.save_pretrained(HERE / name)
    items = [
        {"prompt": prompt_of(name), "seed": seed, "colour": COLOURS[name]} for seed in range(seeds) for name in COLOURS
    ]
    (HERE / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


if __name__ == "__main__":
    make()
