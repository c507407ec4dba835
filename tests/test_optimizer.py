"""Learning rates: over the run, and from layer to layer."""

import pytest
import torch

from pix2seq.errors import UserError
from pix2seq.models.backbone import VisionBackbone, resolve_backbone
from pix2seq.training.optimizer import learning_rate_schedule, parameter_groups


def rates(name: str, steps: int, max_steps: int, end: float, decay_steps: int = 0) -> list[float]:
    """Learning rates, of a peak of 8, of the steps of a run with a warm-up of 4."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    scheduler = learning_rate_schedule(
        optimizer, name, warmup_steps=4, max_steps=max_steps, min_lr_ratio=end, decay_steps=decay_steps
    )
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_linear_is_a_warm_up_and_a_way_down_to_the_end():
    found = rates("linear", 15, 14, 0.5)
    assert found[0] == pytest.approx(4)  # warm-up starts at the end's rate: no step is for nothing
    assert found[4] == 8
    assert found[9] == pytest.approx(6)
    assert found[14] == pytest.approx(4)
    assert rates("linear", 15, 14, 0.0)[:5] == [0, 2, 4, 6, 8]


def test_cosine():
    found = rates("cosine", 15, 14, 0.5)
    assert found[4] == 8
    assert found[9] == pytest.approx(6)
    assert found[6] > 7.5
    assert found[14] == pytest.approx(4)


def test_wsd_is_stable_but_for_the_last_steps():
    found = rates("wsd", 21, 20, 0.5, decay_steps=4)
    assert found[4:17] == [8] * 13
    assert found[18] == pytest.approx(6)
    assert found[20] == pytest.approx(4)
    assert rates("wsd", 21, 20, 0.5) == found  # by default the last fifth


def test_constant_is_warmed_up_from_0_whatever_the_end():
    assert rates("constant", 5, 14, 0.5) == [0, 2, 4, 6, 8]


def test_constant_stays_also_beyond_the_end():
    assert rates("constant", 30, 14, 0.01)[4:] == [8] * 26


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up(name):
    assert rates(name, 3, 2, 0.0) == [0, 2, 4]


def test_layers_further_down_learn_more_slowly(make_model):
    vit = {
        **{"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
        **{"intermediate_size": 32, "patch_size": 16, "image_size": 64},
    }
    model = make_model(backbone_config=vit)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 1e-4, 0.05, layer_decay=0.5)
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    assert found["backbone.model.embeddings.position_embeddings"] == pytest.approx(1e-4 / 8)
    remap_ids = {
        name: int(name.split("layers.")[1].split(".")[0]) for name in found if "backbone.model.layers." in name
    }
    assert set(remap_ids.values()) == {0, 1, 2}
    for name, number in remap_ids.items():
        assert found[name] == pytest.approx(1e-4 * 0.5 ** (2 - number))
    assert found["backbone.model.layernorm.weight"] == pytest.approx(1e-4)
    assert {found[name] for name in found if not name.startswith("backbone.")} == {1e-3}


def test_stages_of_a_pyramid_count_as_the_layers_they_have(make_model):
    model = make_model()  # a ResNet: stem and two stages of one layer
    groups = parameter_groups(model, 1.0, 1.0, 0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    by_place = {
        place: {lr for name, lr in found.items() if place in name} for place in ("embedder", "stages.0", "stages.1")
    }
    assert by_place == {"embedder": {0.25}, "stages.0": {0.5}, "stages.1": {1.0}}


SWIN = "{model_type: swin, embed_dim: 8, depths: [1, 1], num_heads: [2, 2], window_size: 4, image_size: 32}"


@pytest.mark.parametrize(
    ("config", "orders"),
    [
        (
            "{model_type: convnext, hidden_sizes: [8, 16], depths: [1, 2], num_stages: 2}",
            [
                "embeddings",
                "stages.0.layers.0",
                "downsampling_layer",
                "stages.1.layers.0",
                "stages.1.layers.1",
            ],
        ),
        (SWIN, ["embeddings", "layers.0.blocks.0", "layers.0.downsample", "layers.1.blocks.0"]),
        (
            "{model_type: timm_backbone, backbone: test_resnet, use_pretrained_backbone: false, out_indices: [-1]}",
            ["_backbone.conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"],
        ),
    ],
    ids=["convnext", "swin", "timm"],
)
def test_layers_are_told_apart_in_the_order_of_the_network(config, orders):
    backbone = VisionBackbone(resolve_backbone(config).config)
    places = backbone.parameter_layers()
    found = [{depth for name, (_, depth) in places.items() if f"{part}." in name} for part in orders]
    assert all(len(depths) == 1 for depths in found), found
    depths = [depths.pop() for depths in found]
    assert depths == sorted(set(depths))
    assert max(depth for _, depth in places.values()) == depths[-1], "norms of what comes out are the last layer's"
    first = {stage for name, (stage, _) in places.items() if orders[1] in name}
    assert first == {0}, "stages are counted from 0"


def test_a_backbone_without_layers_has_none_to_tell_apart(make_model):
    model = make_model(
        backbone_config={
            **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
        }
    )
    with pytest.raises(UserError, match="--layer_decay"):
        parameter_groups(model, 1.0, 1.0, 0.05, layer_decay=0.5)


def test_frozen_stages_neither_learn_nor_count(make_model):
    model = make_model().train()
    model.backbone.prepare_for_training(False, "local", 1, torch.device("cpu"), 64, frozen_stages=1)
    frozen = {name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.backbone.named_parameters() if "stages.1" not in name}
    model.train()
    statistics = {name: value.clone() for name, value in model.backbone.named_buffers() if "running_mean" in name}
    model.backbone(torch.rand(2, 3, 64, 64)).sum().backward()
    for name, value in model.backbone.named_buffers():
        if name in statistics:
            assert torch.equal(value, statistics[name]) == ("stages.1" not in name)
    assert all((p.grad is None) == (name in frozen) for name, p in model.backbone.named_parameters())
