"""JSON Schema, by the package jsonschema (extra json): a schema checked, a value validated."""

import importlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pujax.errors import ConfigError

Schema = str | Mapping[str, Any]
"""A file with a schema, or the schema itself."""

_VALIDATORS: dict[str | int, tuple[Schema, Any]] = {}
"""By the file, or by the identity of a mapping, which is kept beside it and so stays its own."""


def check_schema(key: str, schema: Schema) -> None:
    """Raise `ConfigError`, naming `key`, for no JSON Schema, or one that refers outside itself.

    A process reads a file once.
    """
    at = _at(schema)
    if at not in _VALIDATORS:
        place = f"{key}={schema}" if isinstance(schema, str) else key
        _VALIDATORS[at] = schema, _validator(place, _read(place, schema))


def is_valid(value: Any, schema: Schema) -> bool:
    """Whether a value of `json.loads` is valid against a schema that was checked."""
    _, validator = _VALIDATORS[_at(schema)]
    try:
        return validator.is_valid(value)
    except RecursionError:  # nested more deeply than Python's stack
        return False


def _at(schema: Schema) -> str | int:
    return schema if isinstance(schema, str) else id(schema)


def parsed(text: str) -> Any:
    """The value of a whole text in JSON, without the constants NaN and Infinity.

    Raises ValueError where it is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _read(place: str, schema: Schema) -> Any:
    """The schema as JSON has it. Raises `ConfigError`."""
    try:
        if not isinstance(schema, str):
            return parsed(json.dumps(schema, allow_nan=False))
        with open(schema, encoding="utf-8-sig") as file:
            return parsed(file.read())
    except OSError as error:
        raise ConfigError(f"{place}: can't be read: {error.strerror}: name another file") from error
    except UnicodeError as error:
        raise ConfigError(f"{place}: is not UTF-8: save it as that") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{place}: no JSON: {error}: mend it") from error


def _validator(place: str, schema: Any) -> Any:
    """A validator by a schema whose references were all followed. Raises `ConfigError`."""
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

    specification = referencing.specification_with(named)
    try:
        known.check_schema(schema)
        resource = specification.create_resource(schema)
        own = resource.id() or ""
        registry = specifications.REGISTRY.with_resource(own, resource)
        validator = _in_decimals(jsonschema, known)(schema, registry=registry)
        _check_followed(resource, registry.resolver(base_uri=own), validator, specification, set())
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"{place}: no JSON Schema: {error.json_path}: {error.message}: mend it"
        ) from error
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


def _in_decimals(jsonschema: Any, draft: Any) -> Any:
    """The draft's class of validators, by which 19.99 is a multiple of .01; by floats it isn't."""
    if "multipleOf" not in draft.VALIDATORS:  # draft 3
        return draft

    def multiple_of(validator: Any, step: Any, number: Any, _: Any) -> Any:
        if validator.is_type(number, "number") and not _divides(step, number):
            yield jsonschema.ValidationError(f"{number!r} is not a multiple of {step}")

    return jsonschema.validators.extend(draft, {"multipleOf": multiple_of})


def _divides(step: float, number: float) -> bool:
    try:
        return (Fraction(str(number)) / Fraction(str(step))).denominator == 1
    except (ValueError, ZeroDivisionError):  # an infinity, as 1e999 is read
        return False


def _check_followed(
    resource: Any, resolver: Any, validator: Any, specification: Any, seen: set[int]
) -> None:
    """Follow every reference of a schema, and of those in it, and try each on a value of each kind.

    Raises LookupError for a reference to what is no schema, and RecursionError for one that goes
    round without looking further into the value.
    """
    schema = resource.contents
    if id(schema) in seen:
        return
    seen.add(id(schema))
    for name in ("$ref", "$dynamicRef") if isinstance(schema, Mapping) else ():
        reference = schema.get(name)
        if not isinstance(reference, str):
            continue
        try:
            found = resolver.lookup(reference)
        except Exception as error:  # of a pointer through what is no schema, whatever that is
            raise LookupError(reference) from error
        if not isinstance(found.contents, Mapping | bool):
            raise LookupError(reference)
        target = specification.create_resource(found.contents)
        _check_followed(target, found.resolver, validator, specification, seen)
    for value in (None, {}, [], 0, ""):
        for _ in validator.descend(value, schema, resolver=resolver):
            pass
    for each in resource.subresources():
        inside = resolver.in_subresource(each)
        _check_followed(each, inside, validator, specification, seen)
