"""Definitions that exist once for each data set, made from one function.

The function's first parameter is the data set. Its parameters for the resources in OWN_RESOURCES get the data set's own
ones: for `flowers`, the parameter `gate` gets the resource `flowers_gate`.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import dagster as dg

from cifar_assets.assets.keys import OWNERS, key_of
from cifar_assets.data_set import OWN_RESOURCES, DataSet

Body = Callable[..., Any]


def bind(body: Body, data_set: DataSet) -> Body:
    """The function for a data set, with the signature that Dagster reads."""
    given = {data_set.named(name): name for name in OWN_RESOURCES}

    def own(arguments: dict[str, Any]) -> dict[str, Any]:
        return {given.get(name, name): value for name, value in arguments.items()}

    @wraps(body)
    def call(*context: Any, **arguments: Any) -> Any:
        return body(data_set, *context, **own(arguments))

    @wraps(body)
    def generate(*context: Any, **arguments: Any) -> Any:
        yield from body(data_set, *context, **own(arguments))

    bound: Any = generate if inspect.isgeneratorfunction(body) else call
    signature = inspect.signature(body)
    _, *parameters = signature.parameters.values()
    bound.__signature__ = signature.replace(
        parameters=[
            each.replace(name=data_set.named(each.name)) if each.name in OWN_RESOURCES else each for each in parameters
        ]
    )
    return bound


def data_set_asset(
    *, group: str, deps: Iterable[str] = (), pool: Callable[[DataSet], str] | None = None, **options: Any
) -> Callable[[Body], Callable[[DataSet], dg.AssetsDefinition]]:
    """Like `dg.asset`: the function becomes one that makes the asset of a data set. `deps` are its other assets."""

    def decorate(body: Body) -> Callable[[DataSet], dg.AssetsDefinition]:
        @wraps(body)
        def build(data_set: DataSet) -> dg.AssetsDefinition:
            return dg.asset(
                key=key_of(data_set, body.__name__),
                group_name=data_set.named(group),
                owners=OWNERS,
                deps=[key_of(data_set, each) for each in deps],
                pool=pool(data_set) if pool else None,
                **options,
            )(bind(body, data_set))

        return build

    return decorate


def data_set_checks(
    specs: Callable[[DataSet], list[dg.AssetCheckSpec]],
) -> Callable[[Body], Callable[[DataSet], dg.AssetChecksDefinition]]:
    """Like `dg.multi_asset_check`, likewise."""

    def decorate(body: Body) -> Callable[[DataSet], dg.AssetChecksDefinition]:
        @wraps(body)
        def build(data_set: DataSet) -> dg.AssetChecksDefinition:
            name = data_set.named(body.__name__)
            return dg.multi_asset_check(name=name, can_subset=True, specs=specs(data_set))(bind(body, data_set))

        return build

    return decorate
