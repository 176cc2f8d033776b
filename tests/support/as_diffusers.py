"""A pytest plugin that puts our classes in the place of diffusers', for diffusers' own tests; see CONTRIBUTING.md."""

import diffusers

from fastddpm.diffusers.disguise import OURS

for theirs, ours in OURS.items():
    setattr(diffusers, theirs.__name__, ours)
