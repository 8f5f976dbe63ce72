"""Who works in stage 1: the preset's transformer, or one of its two experts, with the prompts as it sees them."""

from collections.abc import Callable

import torch

from .console import Console
from .cost import placement_of
from .model import text_contexts
from .plan import Plan
from .proxy import Expert
from .session import Session


def experts_of(
    session: Session, plan: Plan, embeddings: list[torch.Tensor], console: Console
) -> Callable[[float], Expert]:
    """Gives who works at a timestep in 0..1000, loaded when first asked for. `embeddings` (tokens, text_dim) are of the
    prompt and with guidance of the negative prompt; errors are those of loading."""
    stage, offload = plan.proxy, placement_of(plan).offload
    groups, length = [[e] for e in embeddings], session.preset.transformer.text_length
    held: dict[bool, Expert] = {}  # one at a time: two do not fit

    def expert_at(timestep: float) -> Expert:
        second = stage.experts is not None and timestep < 1000 * stage.experts.boundary
        if second not in held:
            held.clear()
            model = session.transformer("proxy", offload, console, second)
            scale = stage.experts.guidance_scale if second and stage.experts else stage.guidance_scale
            prompt, *negative = text_contexts(model, groups, length)
            weaker = None
            if stage.is_autoguided:
                bare = session.without_adapter("proxy", offload, console)
                weaker = bare, text_contexts(bare, groups[:1], length)[0]
            held[second] = Expert(model, prompt, negative[0] if negative else None, scale, weaker)
        return held[second]

    return expert_at
