"""The compiled programs that a restart finds again."""

from pathlib import Path

import jax

COMPILED = "compiled"


def keep_compiled(run_dir: Path) -> None:
    """Keep the compiled programs of accelerators in RUN/compiled, unless JAX is told another place for them.

    A restart then begins in seconds instead of about a minute (docs/performance.md). Not on CPUs: their programs suit
    one model of processor, and compile fast.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:  # pyright: ignore
        jax.config.update("jax_compilation_cache_dir", str((run_dir / COMPILED).resolve()))
