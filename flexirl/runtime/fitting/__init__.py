"""Engine profiles from measurements: calibration, operator tables, recorded runs of other engines."""
