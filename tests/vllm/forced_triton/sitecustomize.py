"""Has vLLM believe in Triton on a CPU, so that its second model runner can be tested there, through Triton's interpreter.

On PYTHONPATH this runs at the start of every process of an engine, before vLLM is imported.
"""

import importlib.abc
import importlib.util
import sys

_MODULE = "vllm.triton_utils.importing"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.HAS_TRITON = True

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
