"""Learning rates over a run and over the layers of a model."""

import pytest
import torch

from pix2seq.errors import UserError
from pix2seq.models.backbone import VisionBackbone, resolve_backbone
from pix2seq.training.optimizer import learning_rate_schedule, parameter_groups


def rates(name: str, num_steps: int, max_steps: int, min_lr_ratio: float, decay_steps: int = 0) -> list[float]:
    """Learning rates of a schedule with a peak of 8 and 4 warm-up steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    scheduler = learning_rate_schedule(
        optimizer, name, warmup_steps=4, max_steps=max_steps, min_lr_ratio=min_lr_ratio, decay_steps=decay_steps
    )
    learning_rates = []
    for _ in range(num_steps):
        learning_rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return learning_rates


def test_linear_and_cosine_decay_to_the_minimum():
    linear, cosine = rates("linear", 15, 14, 0.5), rates("cosine", 15, 14, 0.5)
    for learning_rates in (linear, cosine):
        assert [learning_rates[step] for step in (0, 4, 9, 14)] == pytest.approx([4, 8, 6, 4])
    assert linear[6] == pytest.approx(7.2)
    assert cosine[6] > 7.5
    assert rates("linear", 15, 14, 0.0)[:5] == [0, 2, 4, 6, 8]


def test_wsd_decays_in_the_last_steps():
    learning_rates = rates("wsd", 21, 20, 0.5, decay_steps=4)
    assert learning_rates[4:17] == [8] * 13
    assert [learning_rates[step] for step in (18, 20)] == pytest.approx([6, 4])
    assert rates("wsd", 21, 20, 0.5) == learning_rates  # the default is a fifth of the run


def test_constant_rises_from_0_and_never_decays():
    assert rates("constant", 30, 14, 0.5) == [0, 2, 4, 6] + [8] * 26


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up(name):
    assert rates(name, 3, 2, 0.0) == [0, 2, 4]


def learning_rate_by_parameter(model, *args, **kwargs) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, *args, **kwargs)
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def test_layer_decay_of_a_vit(make_model):
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = make_model(backbone_config=vit | {"intermediate_size": 32, "patch_size": 16, "image_size": 64})
    lr = learning_rate_by_parameter(model, 1e-3, 1e-4, 0.05, layer_decay=0.5)
    assert lr["backbone.model.embeddings.position_embeddings"] == pytest.approx(1e-4 / 8)
    layers = {name: int(name.split("layers.")[1][0]) for name in lr if "backbone.model.layers." in name}
    assert set(layers.values()) == {0, 1, 2}
    for name, layer in layers.items():
        assert lr[name] == pytest.approx(1e-4 * 0.5 ** (2 - layer))
    assert lr["backbone.model.layernorm.weight"] == pytest.approx(1e-4)
    assert {lr[name] for name in lr if not name.startswith("backbone.")} == {1e-3}


def test_layer_decay_of_a_resnet(make_model):
    lr = learning_rate_by_parameter(make_model(), 1.0, 1.0, 0.05, layer_decay=0.5)
    by_layer = {layer: {lr[name] for name in lr if layer in name} for layer in ("embedder", "stages.0", "stages.1")}
    assert by_layer == {"embedder": {0.25}, "stages.0": {0.5}, "stages.1": {1.0}}


SWIN = "{model_type: swin, embed_dim: 8, depths: [1, 1], num_heads: [2, 2], window_size: 4, image_size: 32}"


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (
            "{model_type: convnext, hidden_sizes: [8, 16], depths: [1, 2], num_stages: 2}",
            ["embeddings", "stages.0.layers.0", "downsampling_layer", "stages.1.layers.0", "stages.1.layers.1"],
        ),
        (SWIN, ["embeddings", "layers.0.blocks.0", "layers.0.downsample", "layers.1.blocks.0"]),
        (
            "{model_type: timm_backbone, backbone: test_resnet, use_pretrained_backbone: false, out_indices: [-1]}",
            ["_backbone.conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"],
        ),
    ],
    ids=["convnext", "swin", "timm"],
)
def test_layers_are_numbered_in_network_order(config, layers):
    positions = VisionBackbone(resolve_backbone(config).config).parameter_layers()
    numbers = [{layer for name, (_, layer) in positions.items() if f"{part}." in name} for part in layers]
    assert all(len(number) == 1 for number in numbers), numbers
    numbers = [number.pop() for number in numbers]
    assert numbers == sorted(set(numbers))
    assert max(layer for _, layer in positions.values()) == numbers[-1]  # norms of the output are in the last layer
    assert {stage for name, (stage, _) in positions.items() if layers[1] in name} == {0}


def test_layer_decay_of_a_backbone_with_one_layer_is_an_error(make_model):
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    with pytest.raises(UserError, match="--layer_decay"):
        parameter_groups(make_model(backbone_config=resnet), 1.0, 1.0, 0.05, layer_decay=0.5)


def test_frozen_stages_keep_weights_and_statistics(make_model):
    model = make_model().train()
    model.backbone.prepare_for_training(False, "local", 1, torch.device("cpu"), 64, frozen_stages=1)
    frozen = {name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.backbone.named_parameters() if "stages.1" not in name}
    model.train()
    statistics = {name: value.clone() for name, value in model.backbone.named_buffers() if "running_mean" in name}
    model.backbone(torch.rand(2, 3, 64, 64))[0].sum().backward()
    buffers = dict(model.backbone.named_buffers())
    assert all(torch.equal(buffers[name], statistics[name]) == ("stages.1" not in name) for name in statistics)
    assert all((p.grad is None) == (name in frozen) for name, p in model.backbone.named_parameters())
