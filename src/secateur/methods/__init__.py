"""One file per paper. Importing this package registers them."""

from secateur.methods import slimgpt as slimgpt
from secateur.methods import two_ssp as two_ssp
from secateur.methods.registry import Cost, Method, Option, get_method, method, methods

__all__ = ["Cost", "Method", "Option", "get_method", "method", "methods"]
