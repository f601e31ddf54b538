"""`infc recipe`: the schema of `model.yaml`, and a recipe with every default filled in."""

import json

import click


@click.group("recipe")
def command() -> None:
    """Show what a recipe may say.

    \b
      infc recipe schema > model.schema.json
      infc recipe show model.yaml --set dtype=float32
    """


@command.command()
def schema() -> None:
    """Print the JSON schema of model.yaml: keys, defaults, units, documentation."""
    from ..recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))


@command.command()
@click.argument("recipe")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."
)
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check a recipe and print it with every key."""
    import yaml

    from ..recipe import load_recipe

    data = load_recipe(recipe, overrides).recipe.model_dump()
    click.echo(yaml.safe_dump(data, sort_keys=False), nl=False)
