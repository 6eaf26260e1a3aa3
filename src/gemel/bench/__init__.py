"""How fast the engine is on this machine, and how fast the machine would allow it to be.

Every benchmark yields the same `Timeline` twice: once from the engine, once from a roofline simulation that drives the engine's own
scheduler with a clock instead of a model. One function turns either into figures, so measured and planned always share their units.
"""
