"""The compute of an E-step (docs/method.md, 7.3)."""

from pathlib import Path

from boltlm.errors import UserError
from boltlm.training.compute import read_compute, write_compute


def check_reuse(model: Path, previous: Path) -> None:
    """Raises UserError where the latents in `previous` were drawn by `model` itself: its draws for
    one chunk are the same in every entry of `latents`, so they would count twice."""
    if read_compute(model).key in read_compute(previous).lineage:
        raise UserError(
            f"{previous}: it was drawn by {model}, whose draws are the same in every entry of"
            " `latents`; `previous` must be of an iteration before"
        )


def record_estep_compute(
    name: str, forward_tokens: int, *, model: Path, reused: Path | None, out: Path
) -> dict[str, int]:
    """Write the ComputeRecord of data/latents/<name>, `out`, and return its metrics. A forward pass
    takes a third of the FLOPs of a training step. `forward_tokens`: eq. (15). `reused`: the folder
    of the latents that it took over."""
    drawn_by = read_compute(model)
    record = write_compute(
        out,
        f"latents/{name}",
        flops=forward_tokens * drawn_by.flops_per_token // 3,
        flops_per_token=drawn_by.flops_per_token,
        history=[drawn_by.lineage, *([read_compute(reused).lineage] if reused else [])],
    )
    return {"estep_flops": record.own_flops, "history_flops": record.history_flops}
