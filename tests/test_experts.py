from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from atlasvid_cli.experts import experts_of
from atlasvid_cli.model import text_contexts
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.session import Session
from atlasvid_cli.weights import load_transformer


@pytest.fixture
def made(console):
    """(session, plan, who works) of a small proxy by a preset file."""

    def make(preset, **options):
        ours = Session(str(preset))
        plan = make_plan(Request(str(preset), 256, 192, Fraction(1, 2), **options))
        return ours, plan, experts_of(ours, plan, ours.embeddings(("a red ball", ""), console), console)

    return make


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_autoguidance_leads_away_from_the_model_without_its_adapter(made, random_preset, console):
    ours, plan, expert_at = made(random_preset)
    expert = expert_at(999.0)
    bare, prompt = expert.weaker
    assert same(bare, load_transformer(ours.folder, dtype=ours.dtype)) and not same(bare, expert.model)
    [asked] = ours.embeddings(("a red ball",), console)
    [read] = text_contexts(bare, [[asked]], plan.preset.transformer.text_length)
    assert torch.equal(prompt.keys_values[0][0], read.keys_values[0][0])
    assert not torch.equal(prompt.keys_values[0][0], expert.prompt.keys_values[0][0])  # the adapter reads otherwise
    assert expert_at(1.0) is expert


def test_unguided_there_is_nothing_to_lead_away_from(made, random_preset, console):
    ours, plan, _ = made(random_preset, guidance_scale=1.0)
    expert = experts_of(ours, plan, ours.embeddings(("a red ball",), console), console)(999.0)
    assert expert.weaker is None and expert.negative is None


def test_two_experts_are_guided_where_one_is(experts_preset):
    first = make_plan(Request(str(experts_preset), 256, 192, Fraction(1, 2))).proxy
    second = replace(first.experts, guidance_scale=2.0)
    assert replace(first, guidance_scale=1.0, experts=second).passes == 2
    assert replace(first, guidance_scale=1.0, experts=replace(second, guidance_scale=1.0)).passes == 1


def test_two_experts_take_turns_at_the_boundary(made, experts_preset):
    _, plan, expert_at = made(experts_preset)
    at = 1000 * plan.preset.experts.boundary
    first, second = expert_at(at), expert_at(at - 1)
    assert expert_at(at - 1) is second and expert_at(at) is not first  # which was let go
    assert not same(first.model, second.model) and second.weaker is None
    scales = plan.proxy.guidance_scale, plan.preset.experts.guidance_scale
    assert (first.guidance_scale, second.guidance_scale) == scales
