"""What several evals use, and what a run does with all of them.

Tasks     pooling (a vector per text), probes (k-sparse and full), concept_probes (scr, tpp), first_letter (absorption)
Numbers   errors: standard errors whose sample are documents, entities or classes
A run     declarations (METRICS, CONFIG: read without importing), settings (--eval_config), saebench (result files),
          stored (which results are there)
"""
