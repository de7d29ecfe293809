"""Offline lm-eval tasks, made from the held-out part of Python's standard library or generated.

`TaskManager(include_path=TASKS_FOLDER)` finds them; the data is made by `eval_tasks.build` or `eval_tasks.shell_game`
when a task is loaded.
"""

from pathlib import Path

TASKS_FOLDER = Path(__file__).parent
"""Folder of the task files (YAML)."""
TASKS = tuple(sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml")))
"""Names of the tasks; each is defined in the file of its name."""
