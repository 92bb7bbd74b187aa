"""JSON Schema, by the package jsonschema (extra json): a schema checked, and what it holds of."""

import importlib
import json
import os
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pujax.errors import ConfigError

Schema = str | Mapping[str, Any]
"""A file with a schema, or the schema itself."""

_VALIDATORS: dict[str | int, tuple[Schema, Any]] = {}
"""By the file, or by the identity of a mapping, which is kept beside it and so stays its own."""


def check_schema(key: str, schema: Schema) -> None:
    """Raise `ConfigError`, naming `key`, for what is no schema or leads outside itself.

    A file is read once a process.
    """
    at = schema if isinstance(schema, str) else id(schema)
    if at not in _VALIDATORS:
        place = f"{key}={schema}" if isinstance(schema, str) else key
        _VALIDATORS[at] = schema, _validator(place, _read(place, schema))


def holds(schema: Schema, value: Any) -> bool:
    """Whether a schema that was checked holds of a value of `json.loads`."""
    _, validator = _VALIDATORS[schema if isinstance(schema, str) else id(schema)]
    try:
        return validator.is_valid(value)
    except RecursionError:  # nested more deeply than Python's stack
        return False


def parsed(text: str) -> Any:
    """The value of a whole text in JSON, which has neither NaN nor infinities.

    Raises ValueError where it is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _read(place: str, schema: Schema) -> Any:
    """The schema as JSON has it."""
    try:
        if not isinstance(schema, str):
            return parsed(json.dumps(schema, allow_nan=False))
        with open(os.path.expanduser(schema), encoding="utf-8-sig") as file:
            return parsed(file.read())
    except OSError as error:
        raise ConfigError(f"{place}: can't be read: {error.strerror}") from error
    except UnicodeError as error:
        raise ConfigError(f"{place}: is not UTF-8: save it as that") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{place}: no JSON: {error}: mend it") from error


def _validator(place: str, schema: Any) -> Any:
    try:
        jsonschema = importlib.import_module("jsonschema")
        specifications = importlib.import_module("jsonschema_specifications")
        referencing = importlib.import_module("referencing.jsonschema")
    except ImportError as error:
        raise ConfigError(
            f"{place}: schemas are checked by jsonschema, and it can't be imported ({error}): "
            "pip install 'pujax[json]'"
        ) from error
    if not isinstance(schema, dict):
        raise ConfigError(f"{place}: write a JSON object, not {json.dumps(schema):.60}")
    latest = jsonschema.Draft202012Validator
    named = schema.get("$schema", latest.META_SCHEMA["$schema"])
    known = jsonschema.validators.validator_for({"$schema": str(named)}, None)
    if known is None:
        raise ConfigError(
            f"{place}: jsonschema knows no draft {named!r}: the latest is "
            f"{latest.META_SCHEMA['$schema']}"
        )

    def multiple_of(_: Any, step: Any, number: Any, __: Any) -> Any:
        """As decimals: 19.99 is a multiple of .01, which floats say it isn't."""
        if not known.TYPE_CHECKER.is_type(number, "number") or _divides(step, number):
            return
        yield jsonschema.ValidationError(f"{number!r} is not a multiple of {step}")

    draft = jsonschema.validators.extend(known, {"multipleOf": multiple_of})
    specification = referencing.specification_with(named)
    try:
        known.check_schema(schema)
        resource = specification.create_resource(schema)
        own = resource.id() or ""
        registry = specifications.REGISTRY.with_resource(own, resource)
        _check_references(resource, registry.resolver(base_uri=own))
        validator = draft(schema, registry=registry)
        for value in (None, {}, [], 0, ""):  # one that refers to itself goes round at once
            validator.is_valid(value)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{place}: no JSON Schema: {error.json_path}: {error.message}") from error
    except LookupError as error:
        raise ConfigError(
            f"{place}: a $ref leads nowhere ({error}): nothing is fetched: put what it names under "
            "$defs"
        ) from error
    except (RecursionError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{place}: no schema that can be followed ({type(error).__name__}: {error!s:.80}): "
            "look for a $ref to itself or to what is no schema"
        ) from error
    return validator


def _divides(step: float, number: float) -> bool:
    try:
        return (Fraction(str(number)) / Fraction(str(step))).denominator == 1
    except (ValueError, ZeroDivisionError):  # an infinity, as 1e999 is read
        return False


def _check_references(resource: Any, resolver: Any) -> None:
    """Raise LookupError for a reference of a schema's, or of one in it, to what is no schema."""
    names = ("$ref", "$dynamicRef") if isinstance(resource.contents, Mapping) else ()
    for name in names:
        reference = resource.contents.get(name)
        if not isinstance(reference, str):
            continue
        try:
            found = resolver.lookup(reference).contents
        except Exception as error:  # of a pointer through what is no schema, whatever that is
            raise LookupError(reference) from error
        if not isinstance(found, Mapping | bool):
            raise LookupError(reference)
    for each in resource.subresources():
        _check_references(each, resolver.in_subresource(each))
