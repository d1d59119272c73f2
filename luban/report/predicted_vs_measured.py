"""Predicted vs measured cost of a run: memory, time, utilisation, energy."""

from __future__ import annotations

from typing import Any

from luban.core.units import bytes_, counted, milliseconds, seconds
from luban.planner.remat.schedules import Solved

NEAR = 0.01  # relative distance to the best held-out loss at which it counts as reached


def predicted_vs_measured(figures: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows (quantity, predicted, measured) of a run, from its manifest's figures and its metrics; empty if it recorded
    none. The prediction's caveats are in `figures["prediction_caveats"]`."""
    known = [
        _memory(figures),
        _step(figures),
        _speed(figures),
        _waiting(figures),
        *_target(figures, rows),
        _energy(figures),
    ]
    known += [_message(row) for row in figures.get("messages", ())]
    known += [_schedule(row) for row in figures.get("schedules", ())]
    lines = [line for line in known if line]
    return [
        *lines,
        *((name, "", kernel) for name, _, kernel in (str(line).partition(": ") for line in figures.get("kernels", ()))),
    ]


def energy(figures: dict[str, Any], spent: float) -> str:
    """ ", up to 1.2 kWh" for `spent` seconds at the accelerator's full power; "" if the power isn't known."""
    watts = figures.get("accelerator_watts")
    return "" if watts is None else f", up to {watts * spent / 3.6e6:.3g} kWh"


def _difference(predicted: float, measured: float) -> str:
    return f" ({measured / predicted - 1:+.0%})" if predicted else ""


def _memory(figures: dict[str, Any]) -> tuple[str, str, str] | None:
    on_gpu = "peak_cuda_bytes" in figures and figures.get("device") != "cpu"
    predicted = figures.get("predicted_memory_bytes" if on_gpu else "predicted_process_bytes")
    measured = figures.get("peak_cuda_bytes" if on_gpu else "peak_rss_bytes")
    if not predicted or not measured:
        return None
    name = "peak memory of the accelerator" if on_gpu else "peak memory of the process"
    return name, bytes_(predicted), bytes_(measured) + _difference(predicted, measured)


def _step(figures: dict[str, Any]) -> tuple[str, str, str] | None:
    predicted, measured = figures.get("predicted_step_seconds"), figures.get("step_seconds")
    if not predicted or not measured:
        return None
    return "median step time", milliseconds(predicted), milliseconds(measured) + _difference(predicted, measured)


def _speed(figures: dict[str, Any]) -> tuple[str, str, str] | None:
    flops, step = figures.get("model_flops_per_step"), figures.get("step_seconds")
    if not flops or not step:
        return None
    peak, predicted = figures.get("peak_flops"), figures.get("predicted_step_seconds")

    def rate(each: float) -> str:
        mfu = f", {flops / each / peak:.1%} of {peak / 1e12:,.0f}" if peak else ""
        return f"{flops / each / 1e12:.3g} TFLOP/s{mfu}"

    return "model FLOP/s, MFU", rate(predicted) if predicted else "", rate(step)


def _energy(figures: dict[str, Any]) -> tuple[str, str, str] | None:
    """Beside that of accelerators which draw all that they may."""
    joules, read = figures.get("energy_joules"), figures.get("energy_share")
    if joules is None or not read:
        return None
    most = read * figures.get("accelerator_watts", 0.0) * figures.get("seconds", 0.0)
    name = "energy, read off the GPUs" if read == 1 else f"energy, read off {read:.0%} of the GPUs"
    share = f", {joules / most:.0%} of that" if most else ""
    return name, f"up to {most / 3.6e6:.3g} kWh" if most else "", f"{joules / 3.6e6:.3g} kWh{share}"


def _message(row: dict[str, Any]) -> tuple[str, str, str]:
    """A collective of a run with several processes, measured alone."""
    known = [(way, row[way]) for way in ("closed form", "fluid", "packets") if way in row]
    predicted = ", ".join(f"{way} {milliseconds(found)}" for way, found in known)
    name = f"{row['axis']}: {row['collective']} of {row['what']}, {bytes_(row['bytes'])} at once over {row['processes']} processes"
    return name, predicted, milliseconds(row["measured"]) + _difference(known[0][1] if known else 0.0, row["measured"])


def _schedule(row: dict[str, Any]) -> tuple[str, str, str]:
    """What the layers of a stack keep by a schedule of rematerialisation; it was solved for what was measured in the first step."""
    budget = f", budget {row['budget']}" * bool(row["budget"])
    return f"activations of {counted(row['layers'], 'layer')} by {row['remat']}{budget}", "", str(Solved(**row))


def _waiting(figures: dict[str, Any]) -> tuple[str, str, str] | None:
    return ("waiting for data", "", f"{figures['data_wait']:.2%} of the time") if "data_wait" in figures else None


def _target(figures: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Time and energy of the whole run, and until the held-out loss was close to its best."""
    measured = [row for row in rows if row.get("heldout_loss") is not None and "seconds" in row]  # null: it was NaN
    held = [(row["heldout_loss"], row["seconds"]) for row in measured]
    lines = []
    if held:
        best = min(loss for loss, _ in held)
        reached = next(when for loss, when in held if loss <= (1 + NEAR) * best)
        lines.append(
            (
                f"within {NEAR:.0%} of the best held-out loss, {best:.3f}",
                "",
                f"after {seconds(reached)}{energy(figures, reached)}",
            )
        )
    if "seconds" in figures:
        lines.append(("the whole run", "", seconds(figures["seconds"]) + energy(figures, figures["seconds"])))
    return lines
