import math

import pytest
import torch

from pix2seq.models.fused_modulation import FusedModulation
from pix2seq.models.spatial_modulation import DecodedBoxes, SpatialModulation
from tests.test_architectures import build

NUM_BINS, VOCAB_SIZE, SIDE = 11, 20, 8
FIRST_BIN = VOCAB_SIZE - NUM_BINS
BOS, CLASS = 1, 5


@pytest.fixture
def modulation():
    torch.manual_seed(0)
    modulation = SpatialModulation(num_heads=2, num_bins=NUM_BINS, vocab_size=VOCAB_SIZE)
    for parameter in modulation.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return modulation


def tokens(*values) -> torch.Tensor:
    """Token ids (1, L): floats are coordinates."""
    return torch.tensor([[FIRST_BIN + round(10 * v) if isinstance(v, float) else v for v in values]])


def expected(modulation: SpatialModulation, slot: int, y: float | None, x: float | None, boxes=()) -> torch.Tensor:
    """The values (H, N) around a reference point; None where it is unknown. Boxes of earlier objects are yxyx."""
    values = torch.zeros(2, SIDE, SIDE)
    for head in range(2):
        for row in range(SIDE):
            for column in range(SIDE):
                cells = (row + 0.5) / SIDE, (column + 0.5) / SIDE
                for axis, reference in enumerate((y, x)):
                    if reference is not None:
                        precision = math.exp(modulation.log_precision[slot, axis, head])
                        distance = cells[axis] - reference - modulation.offset[slot, axis, head].item()
                        values[head, row, column] -= precision * distance**2
                covered = [
                    math.exp(
                        -sum(((cells[a] - (box[a] + box[a + 2]) / 2) / (box[a + 2] - box[a]) * 2) ** 2 for a in (0, 1))
                    )
                    for box in boxes
                ]
                values[head, row, column] -= modulation.coverage_weight[slot, head].item() * max(covered, default=0)
    return values.flatten(1)


def test_the_values_depend_on_what_is_known_of_the_boxes(modulation):
    first, second = (0.1, 0.2, 0.5, 0.8), (0.3, 0.6, 0.7, 0.9)
    input_ids = tokens(BOS, *first, CLASS, *second, CLASS)
    references = [
        (None, None),  # nothing precedes the first object
        (0.1, None),
        (0.1, 0.2),
        (0.3, 0.2),  # the center in y
        (0.3, 0.5),  # the center
        (0.1, 0.2),  # the corner of the previous object
        (0.3, 0.2),  # y1 and the x1 of the previous object
        (0.3, 0.6),
        (0.5, 0.6),
        (0.5, 0.75),
        (0.3, 0.6),
    ]
    values = modulation(input_ids, num_visual=SIDE**2)
    assert values.shape == (1, 2, 11, SIDE**2)
    for position, (y, x) in enumerate(references):
        boxes = (first, second)[: position // 5]
        torch.testing.assert_close(values[0, :, position], expected(modulation, position % 5, y, x, boxes))


def test_one_step_equals_the_whole_sequence(modulation):
    torch.manual_seed(1)
    input_ids = torch.randint(FIRST_BIN, VOCAB_SIZE, (3, 17))
    whole = modulation(input_ids, num_visual=SIDE**2)
    visual_tokens = torch.zeros(3, SIDE**2, 4)
    decoded = DecodedBoxes.empty(visual_tokens)
    with_int, with_tensor = (FusedModulation(modulation, visual_tokens, torch.float32) for _ in range(2))
    for position in range(17):
        token_ids, index = input_ids[:, position], torch.tensor(position)
        for values in (
            modulation(token_ids[:, None], SIDE**2, index[None], decoded),
            with_int(token_ids, position),
            with_tensor(token_ids, index),
        ):
            torch.testing.assert_close(values[:, :, 0], whole[:, :, position])


def test_autocast_does_not_round_the_reference():
    """Token ids of a large vocabulary are not exact in bfloat16."""
    modulation = SpatialModulation(num_heads=2, num_bins=1000, vocab_size=1084)
    input_ids = torch.randint(84, 1084, (3, 17), generator=torch.Generator().manual_seed(3))
    expected = modulation(input_ids, SIDE**2)
    fused = FusedModulation(modulation, torch.zeros(3, SIDE**2, 4), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(modulation(input_ids, SIDE**2), expected)
        for position in range(17):
            values = fused(input_ids[:, position], position)
            torch.testing.assert_close(values[:, :, 0], expected[:, :, position])


def test_rows_at_different_positions(modulation):
    """As in an exported model, whose rows need not start at the same time."""
    input_ids = torch.randint(FIRST_BIN, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(2))
    whole = modulation(input_ids, SIDE**2)
    decoded = DecodedBoxes.empty(torch.zeros(2, SIDE**2, 4))
    for position in range(17):
        if position == 3:
            decoded.last_tokens[1] = 0  # the second row starts now
        positions = torch.tensor([position, max(position - 3, 0)])
        values = modulation(input_ids[[0, 1], positions][:, None], SIDE**2, positions, decoded)
        for row in range(2):
            torch.testing.assert_close(values[row, :, 0], whole[row, :, positions[row]])


def test_visual_tokens_must_form_a_square(modulation):
    with pytest.raises(ValueError, match="60 visual tokens do not form a square"):
        modulation(tokens(BOS), num_visual=60)


@pytest.mark.parametrize("decoder", ["llama", "transformer"])
def test_attention_moves_to_the_reference(decoder):
    """With a high precision, the output depends only on the visual token at the reference point."""
    model = build(decoder=decoder, decoder_layers=1).eval()
    modulation = model.decoder.spatial_modulation
    with torch.no_grad():
        modulation.log_precision.fill_(8.0)
        modulation.offset.zero_()
    side = 4
    first_bin = model.tokenizer.first_bin_id
    visual_tokens = torch.randn(1, side**2, 16)
    input_ids = torch.tensor([[BOS, first_bin + 7, first_bin + 12]])  # 7/19 and 12/19: row 1, column 2
    changed = {}
    for cell in range(side**2):
        other = visual_tokens.clone()
        other[0, cell] += 1
        difference = [model.decoder(tokens, input_ids).last_hidden_state[0, -1] for tokens in (visual_tokens, other)]
        changed[cell] = (difference[0] - difference[1]).abs().max().item() > 1e-5
    assert [cell for cell, is_changed in changed.items() if is_changed] == [1 * side + 2]


def test_a_model_without_modulation_has_no_parameters_of_it():
    assert build(decoder="llama", spatial_modulation=False).decoder.spatial_modulation is None
    assert build(decoder="transformer").decoder.spatial_modulation is not None
