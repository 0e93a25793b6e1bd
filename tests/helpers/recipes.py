"""Recipes for networks without a detection head, where nothing says what bits cost."""

from quantrack.quantization.recipe import parse_recipe

DEFAULT_BY_ROLE = parse_recipe("default").with_plan(None).steps
