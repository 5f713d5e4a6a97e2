from tests.cluster.conftest import fake_jobs, study_file

__all__ = ["fake_jobs", "study_file"]
