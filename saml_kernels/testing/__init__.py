"""What tuning, ``saml-rec bench``, the benchmarks and the tests share: problem, accuracy gate, timing protocol.

    problem     shapes → inputs, parameters and cotangents of one trunk and one batch, and its evaluation
    accuracy    ‖out − ref‖ / ‖ref‖ against float64, the bounds, rows at a kink, the gate
    timing      contenders in turns, medians and percentiles, ratios round by round

``import saml_kernels`` does not import it.
"""
