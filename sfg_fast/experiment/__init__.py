"""The paper's experiment (section 3): methods x seeds trained and tested on one cohort, Table 1, tests, figures."""
