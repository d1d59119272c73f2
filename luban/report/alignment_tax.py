"""What each stage of a model's training cost and gained on one suite, along the lineage (the alignment tax of Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from luban.core.lineage import ancestors
from luban.report.comparison import Comparison, Difference, compare
from luban.report.gather import Found
from luban.report.lineage_graph import Family


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model that was measured, and the model it was trained from that was measured, too."""

    model: str  # name
    model_hash: str
    before: str  # name of the model before it
    before_hash: str
    comparison: Comparison  # first: before, second: this stage

    @property
    def lost(self) -> list[Difference]:
        """Figures that got worse by more than chance (p below 0.05)."""
        return [each for each in self.comparison.differences if each.verdict == "first"]

    @property
    def gained(self) -> list[Difference]:
        """Figures that got better by more than chance."""
        return [each for each in self.comparison.differences if each.verdict == "second"]


def stages_of(evaluations: Sequence[Found]) -> list[Stage]:
    """Each measured model beside the nearest measured model that it descends from.

    An evaluation of a model without a lineage, such as a foreign one, is the root of those that have no measured ancestor, where
    there is just one such root. Of several evaluations of a model the first given counts.
    """
    measured: dict[str, Found] = {}
    for found in evaluations:
        measured.setdefault(_identity(found), found)
    linked = {key: next((k for k in _ancestors(found) if k in measured), None) for key, found in measured.items()}
    roots = [key for key, found in measured.items() if found.manifest.parent("model") is None]
    stages = []
    for key, found in measured.items():
        before = linked[key]
        if before is None and len(roots) == 1 and key != roots[0]:
            before = roots[0]
        if before is None:
            continue
        for comparison in compare([measured[before], found]):
            stages.append(
                Stage(
                    model=_name(found),
                    model_hash=key,
                    before=_name(measured[before]),
                    before_hash=before,
                    comparison=comparison,
                )
            )
    return stages


def _identity(found: Found) -> str:
    model = found.manifest.parent("model")
    return model.content_hash if model else str(found.manifest.config.get("model") or found.manifest.content_hash)


def _name(found: Found) -> str:
    model = found.manifest.parent("model")
    return model.name if model else str((found.manifest.settings.get("about") or {}).get("model") or found.name)


def _ancestors(found: Found) -> Iterator[str]:
    """Hashes of what the evaluated model was made from, the nearest first."""
    model = found.manifest.parent("model")
    return (parent.content_hash for parent in ancestors(model)) if model else iter(())


def tax_tree(evaluations: Sequence[Found], stages: Sequence[Stage]) -> str:
    """The measured models as a family tree in SVG, each with what its stage lost and gained; empty without a stage."""
    if not stages:
        return ""
    family = Family()
    for found in evaluations:
        family.names.setdefault(_identity(found), (_name(found), "run"))
    for stage in stages:
        family.edges.add((stage.before_hash, stage.model_hash))
        parts = [f"−{len(stage.lost)}"] * bool(stage.lost) + [f"+{len(stage.gained)}"] * bool(stage.gained)
        first = max(stage.comparison.differences, key=lambda each: abs(each.difference))
        family.notes[stage.model_hash] = f"{' '.join(parts) or '±0'} · {first.score} {first.difference:+.3f}"
    return family.draw()
