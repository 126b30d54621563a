"""Facts that no other test would miss: each was broken on purpose once, and every test passed."""

from __future__ import annotations

import numpy as np
import torch

from smpo_fast.config import loading
from smpo_fast.config.schema import Labels
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.labels import weigh
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.locate import find

CPU = torch.device("cpu")


def test_mean_and_deviation_of_the_vae_are_scaled_alike() -> None:
    """A sample of SDXL's VAE whose deviation is not times 0.13 would have 7.7 times its noise."""
    encoders = Encoders(find(loading.from_dict({}).model), CPU)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = encoders.vae.encode(pixels).latent_dist
    found = {}
    for factor in (1.0, 0.13025):
        encoders.vae.register_to_config(scaling_factor=factor, shift_factor=0.25)
        found[factor] = encoders.encode_images(pixels)
    torch.testing.assert_close(found[1.0], (posterior.mean - 0.25, posterior.std))
    torch.testing.assert_close(found[0.13025], (0.13025 * (posterior.mean - 0.25), 0.13025 * posterior.std))


def test_each_image_is_told_its_own_size_and_crop() -> None:
    """With data.conditioning = "original" the time ids are [B, 2, 6]; the UNet's rows are winner, loser, winner, .."""
    ids = torch.arange(3 * 2 * 6).float().reshape(3, 2, 6)
    cond = Conditioning(torch.zeros(3, 4, 8), torch.zeros(3, 5), ids)
    denoiser = Denoiser.__new__(Denoiser)  # of which only the dtype matters here
    denoiser.dtype = torch.float32
    rows = denoiser.unet_inputs(cond)["added_cond_kwargs"]["time_ids"]
    x = torch.arange(6).reshape(3, 2)  # images numbered as the UNet's rows are flattened
    for row, image in enumerate(x.flatten(0, 1).tolist()):
        assert torch.equal(rows[row], ids[image // 2, image % 2])


def test_of_equal_rewards_the_human_label_names_the_winner() -> None:
    rewards = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    label = np.array([0.0, 1.0, np.nan, 0.0])
    found = weigh(Labels(), rewards, label)
    assert found.winner.tolist() == [1, 0, 0, 0]  # the last: rewards that differ decide
    assert found.weight[:3].tolist() == [0, 0, 0] and found.weight[3] > 0
