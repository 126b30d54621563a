"""Measuring on the device at hand which settings are fastest: ``smpo tune``, and ``run.speed``.

In: the settings of a run. Out: a profile (``planning.profiles``), of settings that agree with eager fp32 and their
seconds.
"""
