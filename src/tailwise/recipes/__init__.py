"""Recipes: settings of trainings, with the scores to expect and the sources of both."""

from tailwise.recipes.recipe import Phase, Recipe, load_recipe

__all__ = ["Phase", "Recipe", "load_recipe"]
