"""The default recipe without its plan: for networks without a detection head, and where planning only takes time."""

from quantrack.quantization.recipe import parse_recipe

DEFAULT_BY_ROLE = parse_recipe("default").with_plan(None).steps
