"""Adapters: tokens, events and patches against plain loops; a volume without whole patches is refused."""

from __future__ import annotations

import pytest
import torch

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.models.adapters import EventAdapter, PatchAdapter, TokenAdapter, example_input, make_adapter


def test_a_token_becomes_its_row_of_the_table() -> None:
    adapter = TokenAdapter(5, 3)
    x_BSD = adapter(torch.tensor([[4, 0], [1, 4]]))
    assert torch.equal(x_BSD[0, 0], adapter.embed.weight[4])
    assert torch.equal(x_BSD[1, 0], adapter.embed.weight[1])
    assert torch.equal(x_BSD[1, 1], x_BSD[0, 0])


def test_each_event_is_mapped_on_its_own() -> None:
    adapter, event_BSC = EventAdapter(4, 3).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    x_BSD = adapter(event_BSC)
    for b in range(2):
        for s in range(5):
            torch.testing.assert_close(x_BSD[b, s], adapter.project.weight_OD @ event_BSC[b, s])


def test_patches_come_in_raster_order_with_channels_first() -> None:
    size, adapter = 2, PatchAdapter(3, 2, 5).double()
    voxel_BCZYX = torch.randn(2, 3, 8, 4, 6, dtype=torch.float64)
    rows = []
    for z in range(0, 8, size):
        for y in range(0, 4, size):
            for x in range(0, 6, size):
                patch_BU = voxel_BCZYX[:, :, z : z + size, y : y + size, x : x + size].reshape(2, -1)
                rows.append(patch_BU @ adapter.project.weight_OD.T)
    torch.testing.assert_close(adapter(voxel_BCZYX), torch.stack(rows, dim=1))


@pytest.mark.parametrize("edges", [(4, 4, 5), (3, 4, 4), (4, 1, 4)])
def test_a_volume_without_whole_patches_is_refused(edges: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"no whole patches of 2\. Fix: pad or crop it"):
        PatchAdapter(1, 2, 5)(torch.zeros(1, 1, *edges))


@pytest.mark.parametrize("name", ["tokens", "events", "patches"])
def test_the_example_has_the_shape_and_type_that_the_named_adapter_takes(name: str) -> None:
    config = BackboneConfig.model_validate({"adapter": name, "num_channels": 2, "patch_size": 2, "d_model": 8})
    x = example_input(config, num_samples=3, seq_len=27, dtype=torch.float64)
    assert x.is_meta
    assert x.dtype == (torch.int64 if name == "tokens" else torch.float64)
    assert make_adapter(config).double().to("meta")(x).shape == (3, 27, 8)
