"""One file per paper. Importing this package registers them."""

from secateur.methods import blockpruner as blockpruner
from secateur.methods import evopress as evopress
from secateur.methods import secateur as secateur
from secateur.methods import shortgpt as shortgpt
from secateur.methods import slicegpt as slicegpt
from secateur.methods import slimgpt as slimgpt
from secateur.methods import two_ssp as two_ssp
from secateur.methods import window as window
from secateur.methods.registry import Amount, Method, Option, Options, as_before, get_method, method, methods

__all__ = ["Amount", "Method", "Option", "Options", "as_before", "get_method", "method", "methods"]
