"""Files: pictures, data sets, shards of samples, and the fingerprint that identifies a job."""
