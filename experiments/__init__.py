"""Experiments as data: a spec file per table or figure, one runner, one report.

python -m experiments list                          # specs, cells, what is done
python -m experiments run table1-smollm2            # resumable cell by cell; a killed run continues
python -m experiments report                        # docs/results.md and docs/figures from the records
"""
