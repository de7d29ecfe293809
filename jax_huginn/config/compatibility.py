"""Which configs may share a run, and which may share weights."""

from typing import NamedTuple

from jax_huginn.config.dicts import flatten, to_dict
from jax_huginn.config.schema import Config

# What may change when a run resumes: how long it is, what it reports and how it is executed, but not what is computed
# from which data. A whole section, or fields of one.
MAY_CHANGE_SECTIONS = ("compute", "validation", "checkpoint", "log", "profile")
MAY_CHANGE_FIELDS = (
    "run_dir",
    "train.steps",
    "train.max_skipped",
    "data.prefetch",
    "data.bad_rows",  # a run that stopped at a bad row has passed none, so it resumes exactly by skipping
    "data.cache_dir",
    "data.cache_gb",
    "parallel.coordinator",
    "parallel.process_count",
    "parallel.process_id",
    "parallel.heartbeat_seconds",
)
# Compared by content, see `data.contents`: a folder may be moved, or its path spelled otherwise.
COMPARED_BY_CONTENT = ("data.path", "data.validation_path", "data.tokenizer")
# What `checkpoint.accept_changes` lets a run change: how it is trained from here on, but neither what it is made of nor
# the optimiser's state.
MAY_BE_ACCEPTED = (
    "train.batch_size",
    "train.micro_batches",
    "recurrence.mean",
    "recurrence.backprop_depth",
    "recurrence.scheme",
    "recurrence.lockstep",
    "recurrence.curriculum",
    "moe.balance_weight",
    "moe.z_weight",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.cooldown_steps",
    "optimizer.final_fraction",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
)
# The sections that say what the model is, without the fields that weights do not depend on.
MODEL_SECTIONS = ("model", "moe")
NOT_OF_THE_WEIGHTS = ("model.max_length", "model.dtype", "model.param_dtype", "moe.balance_weight", "moe.z_weight")


class Change(NamedTuple):
    """A field that differs between two sessions of a run."""

    name: str
    before: object
    after: object

    @property
    def may_be_accepted(self) -> bool:
        return self.name in MAY_BE_ACCEPTED

    def __str__(self) -> str:
        return f"{self.name} was {self.before!r}, now {self.after!r}"


def changes(old: Config, new: Config, begun: bool = True) -> list[Change]:
    """The fields that a run may not change without a word when it resumes.

    Before it has `begun`, saved a checkpoint, there is no content to compare, so those fields count too.

    The mesh only spreads the work, so all of `parallel` may change, unless tokens are dropped: which ones are dropped
    depends on it.
    """
    drops = "all_to_all" in (old.parallel.dispatch, new.parallel.dispatch)
    sections = MAY_CHANGE_SECTIONS if drops else (*MAY_CHANGE_SECTIONS, "parallel")
    fields = (*MAY_CHANGE_FIELDS, *COMPARED_BY_CONTENT) if begun else MAY_CHANGE_FIELDS
    return [
        Change(name, before, after)
        for name, before, after in _differences(old, new)
        if name.split(".")[0] not in sections and name not in fields
    ]


def describe_may_change() -> str:
    """The sentence that the documentation gives on what may change when a run resumes."""
    sections = ", ".join(f"`{name}`" for name in MAY_CHANGE_SECTIONS)
    fields = ", ".join(f"`{name}`" for name in MAY_CHANGE_FIELDS if not name.startswith("parallel."))
    contents = ", ".join(f"`{name}`" for name in COMPARED_BY_CONTENT)
    accepted = ", ".join(f"`{name}`" for name in MAY_BE_ACCEPTED)
    return (
        f"When a run resumes, these may change: all of {sections}; all of `parallel`, unless its dispatch drops "
        f"tokens; {contents}, if the content is the same; and {fields}. "
        f"With `--checkpoint.accept_changes true` so may {accepted}; what changed is "
        "printed. Any other change is refused by name."
    )


def differences_of_model(ours: Config, theirs: Config) -> list[tuple[str, object, object]]:
    """(field, our value, their value) wherever weights of one config do not fit the other."""
    dense = ours.moe.experts == theirs.moe.experts == 0
    sections = ("model",) if dense else MODEL_SECTIONS
    return [
        each
        for each in _differences(ours, theirs)
        if each[0].split(".")[0] in sections and each[0] not in NOT_OF_THE_WEIGHTS
    ]


def _differences(one: Config, other: Config) -> list[tuple[str, object, object]]:
    first, second = flatten(to_dict(one)), flatten(to_dict(other))
    return [(name, first[name], second[name]) for name in first if first[name] != second[name]]
