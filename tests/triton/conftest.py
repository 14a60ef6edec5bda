"""Makes Triton's interpreter fast enough for a test suite."""

import dataclasses
import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    patched = False
    numpy_types = {}
    numpy_type = interpreter._get_np_dtype

    def _call_device_function(self, *args, **kwargs):
        # A launch patches triton.language. The interpreter does it again at every call of a device function, nine
        # tenths of the time of kernels made of small ones; Triton's own device functions, which see
        # triton.language.core instead, need it once.
        global patched
        if self.fn.__globals__.get("tl") is not tl and not patched:
            interpreter._patch_lang(self.fn)
            patched = True
        return self.rewrite()(*args, **kwargs)

    def _get_np_dtype(dtype):
        # Makes a table of all types at every call.
        name = str(dtype)
        if name not in numpy_types:
            numpy_types[name] = numpy_type(dtype)
        return numpy_types[name]

    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter._get_np_dtype = _get_np_dtype
    # A third of the time went to a condition after every integer operation, which only Triton's debug mode asserts.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
