import pytest
import torch

from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.models.feature_pyramid import FeaturePyramid
from tests.test_architectures import BACKBONES, build, images, target_ids, token_ids

RESNET = (
    "{model_type: resnet, layer_type: basic, embedding_size: 8, hidden_sizes: [8, 12, 16, 20], depths: [1, 1, 1, 1]}"
)


@pytest.mark.parametrize(("level", "side"), [(0, 8), (1, 4), (2, 2)])
def test_the_result_has_the_size_of_its_level(level, side):
    pyramid = FeaturePyramid([3, 5, 7], level, channels=8, num_layers=1)
    feature_maps = [torch.randn(2, width, size, size) for width, size in ((3, 8), (5, 4), (7, 2))]
    assert pyramid(feature_maps).shape == (2, 8, side, side)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_every_feature_map_counts_where_it_is(changed):
    """A change of the upper left cell of a map changes the upper left part of the result."""
    pyramid = FeaturePyramid([3, 3, 3], level=0, channels=8, num_layers=0)
    feature_maps = [torch.randn(1, 3, size, size) for size in (16, 8, 4)]
    # Without the norm, whose statistics are those of the whole map.
    pyramid.norm = torch.nn.Identity()
    before = pyramid(feature_maps)
    feature_maps[changed][..., 0, 0] += 1
    difference = (pyramid(feature_maps) - before).abs().sum(1)[0]
    stride = 2**changed
    assert (difference[:stride, :stride] > 0).all()
    assert (difference[2 * stride :] == 0).all()
    assert (difference[:, 2 * stride :] == 0).all()


@pytest.mark.parametrize("backbone", [RESNET, "efficientnet-lite0"])
@pytest.mark.parametrize(("stage", "stride"), [("p3", 8), ("p4", 16)])
def test_a_model_with_a_pyramid_trains_and_is_restored(backbone, stage, stride, tmp_path):
    model = build(backbone=backbone, backbone_stage=stage, neck_layers=1)
    assert model.encode(images()).shape[1] == (64 // stride) ** 2
    model(images(), token_ids(), target_ids()).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(restored.encode(images()), model.encode(images()))


def test_convolutions_without_a_pyramid():
    model = build(backbone=BACKBONES["vit"], neck_layers=2)
    assert len(model.pyramid.layers) == 2
    model(images(), token_ids(), target_ids()).loss.backward()


def test_a_backbone_with_too_few_stages():
    with pytest.raises(UserError, match=r"--backbone_stage p4: .*fewer than 4 stages; c5 works with any backbone"):
        build(backbone=BACKBONES["resnet"], backbone_stage="p4")
    with pytest.raises(UserError, match=r"--backbone_stage p3: .*only one feature map; c5 works with any backbone"):
        build(backbone=BACKBONES["vit"], backbone_stage="p3")
