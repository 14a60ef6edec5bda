"""Makes Triton's interpreter fast enough for a test suite."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    patched = False

    def _call_device_function(self, *args, **kwargs):
        # A launch patches triton.language. The interpreter does it again at every call of a device function, nine
        # tenths of the time of kernels made of small ones; Triton's own device functions, which see
        # triton.language.core instead, need it once.
        global patched
        if self.fn.__globals__.get("tl") is not tl and not patched:
            interpreter._patch_lang(self.fn)
            patched = True
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_device_function
