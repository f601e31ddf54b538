"""`infc recipe`: the bundled recipes, the schema of `model.yaml`, a recipe with every default."""

import json

import click


@click.group("recipe")
def command() -> None:
    """Show the bundled recipes, or the keys of a recipe.

    \b
      infc recipe list
      infc recipe show qwen2.5-0.5b-instruct
      infc recipe schema > model.schema.json
      infc recipe show model.yaml --set dtype=float32
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(as_json: bool) -> None:
    """List the recipes that are part of infc and can be used by name.

    \b
      infc recipe list --json
    """
    from ..bundled import bundled_recipes
    from ..recipe import load_recipe

    recipes = bundled_recipes().values()
    if as_json:
        entries = [
            {
                "name": one.name,
                "file": str(one.path),
                "summary": one.summary(),
                "recipe": load_recipe(one.path).recipe.model_dump(),
            }
            for one in recipes
        ]
        click.echo(json.dumps(entries, indent=1))
        return
    width = max(len(one.name) for one in recipes)
    for one in recipes:
        click.echo(f"{one.name:<{width}}  {one.summary()}")


@command.command()
def schema() -> None:
    """Print the JSON schema of recipes, with the default, unit and description of each key."""
    from ..recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))


@command.command()
@click.argument("recipe")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe; repeatable.",
)
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check a recipe and print it with all keys.

    RECIPE is the same as for `infc compile`.

    \b
      infc recipe show tiny
      infc recipe show model.yaml --set dtype=float32
    """
    import yaml

    from ..recipe import load_recipe

    data = load_recipe(recipe, overrides).recipe.model_dump()
    click.echo(yaml.safe_dump(data, sort_keys=False), nl=False)
