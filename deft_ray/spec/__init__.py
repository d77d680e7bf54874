"""The spec: what may stand in a YAML, what it means, and what is wrong with one."""

import os

# Pydantic looks through every installed package for plugins; a command that only shows a plan would wait for it.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
