"""Places of oocattn in other libraries, each a module that imports its library when it is first used."""

from oocattn.imports import lazy_attributes

__all__ = ["transformers"]

__getattr__, __dir__ = lazy_attributes(__name__, {__name__: __all__})
