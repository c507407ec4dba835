"""Writing several tokens in one pass of the decoder: a drafter guesses the rest of an object, the decoder reads the
guess at once and says what it would have said after each token (speculative decoding, Leviathan et al., 2023).

A box's first number is never guessed: which object comes next is open, where it lies is not.
"""

from collections.abc import Callable

import torch

from pix2seq.decoding.grammar import Grammar, around, sample_top_p, unscored
from pix2seq.decoding.options import DecodingOptions, Interrupted
from pix2seq.decoding.sentences import Sentences
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT


def with_drafts(
    model,
    pixel_values: torch.Tensor,
    writing: Sentences,
    grammar: Grammar,
    options: DecodingOptions,
    interrupted: Callable[[], bool],
) -> list[Sentences]:
    """All sentences, in parts: those that ended together. Each row goes at its own pace.

    model   offers `start_drafting(pixels, length) -> steps, memory`,
            `draft(thoughts (B, D), ids (B,), slots (B,), memory) -> thoughts, logits (B, V)` and
            `read(ids (B, n), position (B,), steps) -> thoughts (B, n, D), logits (B, n, V)`
    """
    length = TOKENS_PER_OBJECT * options.max_objects
    steps, memory = model.start_drafting(pixel_values, length)
    counts = torch.zeros_like(writing.rows)  # tokens that are written; all but the last have been read
    thoughts, done = None, []  # what the decoder thought before the last token
    while True:
        if interrupted():
            raise Interrupted
        if thoughts is None:
            ids, drafted = torch.full_like(counts, grammar.tokenizer.bos_id)[:, None], torch.zeros_like(counts)
        else:
            ids, drafted = _draft(model, thoughts, writing, counts, grammar, options, memory)
        read, logits = model.read(ids, counts, steps)
        decided, ended = _verify(writing, counts, logits, ids, drafted, grammar, options)
        writing.passes += 1
        thoughts = read[torch.arange(len(read), device=read.device), decided - 1]
        counts = counts + decided
        ended |= counts >= length
        if not ended.any():
            continue
        done.append(writing.of(ended.nonzero()[:, 0]))
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            return done
        writing, counts, thoughts = writing.of(going), counts[going], thoughts[going]
        steps.keep(going)
        memory.keep(going)


def _draft(
    model,
    thoughts: torch.Tensor,
    writing: Sentences,
    counts: torch.Tensor,
    grammar: Grammar,
    options: DecodingOptions,
    memory,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token of each row and guesses of what follows it in its object, ids (B, n), and how many of these
    guesses count, (B,). They stand in the sentences too, until what is right is known."""
    drafted = -counts % TOKENS_PER_OBJECT
    ids = [writing.tokens.gather(1, counts[:, None] - 1)[:, 0]]
    for index in range(int(drafted.max())):
        places = counts[:, None] + index
        thoughts, logits = model.draft(thoughts, ids[-1], places[:, 0] % TOKENS_PER_OBJECT, memory)
        corners = writing.tokens.gather(1, (places - 2).clamp(min=0))
        guess, _ = _say(logits[:, None], places, corners, writing, grammar, options)
        _write(writing.tokens, places, guess, index < drafted[:, None])
        ids.append(guess[:, 0])
    return torch.stack(ids, dim=1), drafted


def _verify(
    writing: Sentences,
    counts: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    drafted: torch.Tensor,
    grammar: Grammar,
    options: DecodingOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes what the decoder says, of logits (B, n, V) after the tokens ids (B, n), as far as these were right.
    Returns how many tokens that are, and whether they end the sentence: (B,) each."""
    rows, columns = torch.arange(len(ids), device=ids.device), torch.arange(ids.shape[1], device=ids.device)
    places = counts[:, None] + columns
    corners = writing.tokens.gather(1, (places - 2).clamp(min=0))
    said, allowed = _say(logits, places, corners, writing, grammar, options)
    if options.draft != "exact":  # a box's second corner keeps to the first one as it is said, not as it was guessed
        corners = torch.cat([corners[:, :2], said[:, :-2]], dim=1) if said.shape[1] > 2 else corners
        said, allowed = _say(logits, places, corners, writing, grammar, options)
    # Where a class is said: just before the guesses end. A row that begins an object has none.
    has_class, at = drafted > 0, (drafted - 1).clamp(min=0)
    score, label = grammar.best_class(logits[rows, at])
    # In the tail of noise objects, where one lies does not matter.
    skimmed = has_class & (ids[rows, drafted] == grammar.tokenizer.noise_id) & (score < options.noise_score)
    skimmed &= writing.noise > 0
    right = _are_right(ids[:, 1:], said[:, :-1], columns[1:] == drafted[:, None], skimmed[:, None], options)
    right &= columns[1:] <= drafted[:, None]

    noise = torch.where(score < options.noise_score, writing.noise + 1, 0)
    stops = has_class & (noise >= options.stop_after_noise) & (options.stop_after_noise > 0)
    right &= ~(stops[:, None] & (columns[1:] == drafted[:, None]))  # nothing is said after such a class
    right &= places[:, 1:] < TOKENS_PER_OBJECT * options.max_objects
    decided = 1 + right.cumprod(dim=1).sum(dim=1)
    written = columns < decided[:, None]
    _write(writing.tokens, places, said, written)
    if options.looks_around:
        offsets, masses = around(allowed.flatten(0, 1), said.flatten(), options.expected_bins)
        coordinates = written & (places % TOKENS_PER_OBJECT != CLASS_SLOT)
        _write(writing.offsets, places, offsets.view_as(said), coordinates)
        _write(writing.masses, places, masses.view_as(said), coordinates)
    judged = has_class & (at < decided)
    objects = (counts[:, None] // TOKENS_PER_OBJECT).clamp(max=options.max_objects - 1)
    if grammar.allow_eos:
        _write(writing.scores, objects, unscored(logits[:, :1]), (drafted == 0)[:, None])
    _write(writing.scores, objects, score[:, None], judged[:, None])
    _write(writing.labels, objects, label[:, None], judged[:, None])
    writing.noise = torch.where(judged, noise, writing.noise)
    ends = writing.tokens.gather(1, (counts + decided)[:, None] - 1)[:, 0] == grammar.tokenizer.eos_id
    return decided, ends | (judged & stops)


def _are_right(
    guesses: torch.Tensor, said: torch.Tensor, are_classes: torch.Tensor, noise: torch.Tensor, options: DecodingOptions
) -> torch.Tensor:
    """Which guesses (B, n) of what is `said` will do. `noise` (B, 1): whether both take the object for it, and the one
    before it was noise too."""
    if options.draft == "unverified":
        return torch.ones_like(guesses, dtype=torch.bool)
    right = guesses == said
    if options.draft == "tolerant":
        right |= noise | ((guesses - said).abs() <= options.draft_bins) & ~are_classes
    return right


def _say(
    logits: torch.Tensor,
    places: torch.Tensor,
    corners: torch.Tensor,
    writing: Sentences,
    grammar: Grammar,
    options: DecodingOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (B, n) at some places (B, n), by logits (B, n, V), and those logits the grammar leaves. `corners`
    (B, n): the tokens two places before."""
    slots = places % TOKENS_PER_OBJECT
    allowed = grammar.of_any_slot(logits.flatten(0, 1), slots.flatten(), corners.flatten())
    uniforms = None if writing.uniforms is None else writing.uniforms.gather(1, places).flatten()
    said = sample_top_p(allowed, options.top_p, options.temperature, uniforms)
    return said.view_as(places), allowed.view_as(logits)


def _write(values: torch.Tensor, places: torch.Tensor, new: torch.Tensor, where: torch.Tensor) -> None:
    """Puts new values (B, n) at their places (B, n) in each row, `where` they are wanted."""
    values.scatter_(1, places, torch.where(where, new.to(values.dtype), values.gather(1, places)))
