"""The Markdown table of parity_report.py."""

import dataclasses

BOUND = "1.5 x the other's + 1e-6"


def beside(ours: float, theirs: float) -> str:
    return f"JAX {ours:.2e}, Torch {theirs:.2e}"


@dataclasses.dataclass
class Claim:
    """A line of the table, or several if more than one kind of quantity was compared."""

    text: str
    section: str
    cases: int = 0
    failures: int = 0
    errors: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Compared -> (error, tolerance), both in words."""


def table(claims: list[Claim], title: str, facts: dict[str, str]) -> str:
    failures = sum(claim.failures > 0 for claim in claims)
    cases = sum(claim.cases for claim in claims)
    verdict = "all hold" if failures == 0 else f"**not all hold: {failures}**"
    lines = [f"# {title}", "", "Written by `python scripts/parity_report.py`; not edited by hand.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", f"{len(claims)} claims in {cases} cases: {verdict}.", ""]
    lines += ["Errors are the largest relative L2 distance of any tensor in any case; a claim without one is exact."]
    section = ""
    for claim in claims:
        if claim.section != section:
            section = claim.section
            lines += ["", f"## {section}", "", "| claim | cases | compared | error | tolerance | holds |"]
            lines += ["|---|---|---|---|---|---|"]
        holds = "yes" if claim.failures == 0 else f"**no, {claim.failures} of {claim.cases} fail**"
        head = (claim.text, str(claim.cases))
        for compared, (error, tolerance) in (claim.errors or {"": ("", "")}).items():
            lines.append("| " + " | ".join((*head, compared, error, tolerance, holds)) + " |")
            head = ("", "")
    return "\n".join(lines) + "\n"
