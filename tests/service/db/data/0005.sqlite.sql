BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0005');
CREATE TABLE api_keys (
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	scope VARCHAR NOT NULL, 
	prefix VARCHAR NOT NULL, 
	digest VARCHAR NOT NULL, 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	revoked_at DATETIME, 
	CONSTRAINT pk_api_keys PRIMARY KEY (id), 
	CONSTRAINT fk_api_keys_tenant_tenants FOREIGN KEY(tenant) REFERENCES tenants (name), 
	CONSTRAINT uq_api_keys_prefix UNIQUE (prefix)
);
INSERT INTO "api_keys" VALUES('id-1','name-1','name-1','scope-1','prefix-1','digest-1','2026-11-20 12:30:15.123456','2026-11-20 12:30:15.123456','2026-11-20 12:30:15.123456');
CREATE TABLE attempts (
	job_id VARCHAR NOT NULL, 
	unit_key VARCHAR NOT NULL, 
	attempts INTEGER NOT NULL, 
	last_failure JSON NOT NULL, 
	CONSTRAINT pk_attempts PRIMARY KEY (job_id, unit_key), 
	CONSTRAINT fk_attempts_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "attempts" VALUES('job_1','unit_key-1',7,'{"ü":[1,0.1,null]}');
CREATE TABLE audit (
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	key_id VARCHAR, 
	peer VARCHAR, 
	action VARCHAR NOT NULL, 
	method VARCHAR NOT NULL, 
	path VARCHAR NOT NULL, 
	request_id VARCHAR NOT NULL, 
	status INTEGER, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_audit PRIMARY KEY (id)
);
INSERT INTO "audit" VALUES('id-1','default','key_id-1','peer-1','action-1','method-1','path-1','request_id-1',7,'2026-11-20 12:30:15.123456');
CREATE TABLE blobs (
	tenant VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	size BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_blobs PRIMARY KEY (tenant, sha256)
);
INSERT INTO "blobs" VALUES('default','9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f',1099511627776,'2026-11-20 12:30:15.123456');
CREATE TABLE calibrations (
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	source JSON NOT NULL, 
	digest VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	problem JSON, 
	summary JSON, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_calibrations PRIMARY KEY (id)
);
INSERT INTO "calibrations" VALUES('cal_1','default','{"kind":"upload","files":[]}','cd','text','ready','{"ü":[1,0.1,null]}','{"ü":[1,0.1,null]}','2026-11-20 12:30:15.123456');
CREATE TABLE events (
	job_id VARCHAR NOT NULL, 
	seq BIGINT NOT NULL, 
	type VARCHAR NOT NULL, 
	data JSON NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (job_id, seq), 
	CONSTRAINT fk_events_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "events" VALUES('job_1',1,'queued','{}','2026-11-20 12:30:15.123456');
CREATE TABLE faults (
	id VARCHAR NOT NULL, 
	score_set VARCHAR NOT NULL, 
	unit_key VARCHAR NOT NULL, 
	kept JSON NOT NULL, 
	got JSON NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_faults PRIMARY KEY (id), 
	CONSTRAINT fk_faults_score_set_score_sets FOREIGN KEY(score_set) REFERENCES score_sets (digest)
);
INSERT INTO "faults" VALUES('id-1','s1','unit_key-1','{"ü":[1,0.1,null]}','{"ü":[1,0.1,null]}','2026-11-20 12:30:15.123456');
CREATE TABLE idempotency_keys (
	tenant VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	request_digest VARCHAR NOT NULL, 
	status INTEGER, 
	body JSON, 
	headers JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_idempotency_keys PRIMARY KEY (tenant, "key")
);
INSERT INTO "idempotency_keys" VALUES('default','key-1','request_digest-1',7,'{"ü":[1,0.1,null]}','{"ü":[1,0.1,null]}','2026-11-20 12:30:15.123456');
CREATE TABLE jobs (
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	stage VARCHAR, 
	done BIGINT NOT NULL, 
	total BIGINT NOT NULL, 
	eta_seconds DOUBLE, 
	request JSON NOT NULL, 
	request_digest VARCHAR NOT NULL, 
	score_set VARCHAR, 
	summary JSON, 
	problem JSON, 
	epoch BIGINT NOT NULL, 
	lease_owner VARCHAR, 
	lease_host VARCHAR, 
	lease_pid INTEGER, 
	lease_process VARCHAR, 
	lease_expires_at DOUBLE, 
	cancel_requested BOOLEAN NOT NULL, 
	predecessor VARCHAR, 
	version BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	started_at DATETIME, 
	finished_at DATETIME, inventory JSON, 
	CONSTRAINT pk_jobs PRIMARY KEY (id), 
	CONSTRAINT fk_jobs_score_set_score_sets FOREIGN KEY(score_set) REFERENCES score_sets (digest)
);
INSERT INTO "jobs" VALUES('job_1','default','search','succeeded','measuring',7,7,1700000000.0,'{"model":"model_1","calibration":"cal_1","budgets":["3.5 bpw"],"schemes":["w4"],"metrics":["output_kl"]}','request_digest-1','s1','{"b":1,"a":{"z":0.1,"y":3.0}}','{"ü":[1,0.1,null]}',7,'lease_owner-1','lease_host-1',7,'lease_process-1',1700000000.0,1,'predecessor-1',7,'2026-11-20 12:30:15.123456','2026-11-20 12:30:15.123456','2026-11-20 12:30:15.123456','{"ü":[1,0.1,null]}');
INSERT INTO "jobs" VALUES('job_2','default','search','running',NULL,7,7,1700000000.0,'{"model":"model_1","calibration":"cal_1","budgets":["3.5 bpw"],"schemes":["w4"],"metrics":["output_kl"]}','request_digest-1',NULL,'{"ü":[1,0.1,null]}','{"ü":[1,0.1,null]}',7,'lease_owner-1','lease_host-1',7,'lease_process-1',1500000000.0,1,'predecessor-1',7,'2026-11-20 12:30:15.123456','2026-11-20 12:30:15.123456','2026-11-20 12:30:15.123456','{"ü":[1,0.1,null]}');
CREATE TABLE models (
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	source JSON NOT NULL, 
	digest VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	problem JSON, 
	summary JSON, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_models PRIMARY KEY (id)
);
INSERT INTO "models" VALUES('model_1','default','{"kind":"upload","files":[]}','ab','ready','{"ü":[1,0.1,null]}','{"ü":[1,0.1,null]}','2026-11-20 12:30:15.123456');
CREATE TABLE plans (
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	job_id VARCHAR NOT NULL, 
	budget VARCHAR NOT NULL, 
	settings_digest VARCHAR NOT NULL, 
	digest VARCHAR, 
	status VARCHAR NOT NULL, 
	document JSON, 
	result JSON NOT NULL, 
	evidence JSON, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_plans PRIMARY KEY (id), 
	CONSTRAINT fk_plans_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_plans_job_id_budget_settings_digest UNIQUE (job_id, budget, settings_digest)
);
INSERT INTO "plans" VALUES('plan_1','default','job_1','3.5 bpw','settings_digest-1','digest-1','optimal','{"v":1}','{"ü":[1,0.1,null]}','{"ü":[1,0.1,null]}','2026-11-20 12:30:15.123456');
CREATE TABLE runners (
	name VARCHAR NOT NULL, 
	host VARCHAR NOT NULL, 
	pid INTEGER NOT NULL, 
	process VARCHAR NOT NULL, 
	version VARCHAR NOT NULL, 
	started_at DATETIME NOT NULL, 
	seen_at DOUBLE NOT NULL, 
	metrics VARCHAR NOT NULL, 
	CONSTRAINT pk_runners PRIMARY KEY (name)
);
INSERT INTO "runners" VALUES('name-1','host-1',7,'process-1','version-1','2026-11-20 12:30:15.123456',1700000000.0,'metrics-1');
CREATE TABLE score_sets (
	digest VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	settings JSON NOT NULL, 
	inspection JSON, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_score_sets PRIMARY KEY (digest)
);
INSERT INTO "score_sets" VALUES('s1','default','{"model":"ab","seed":0}','{"é":[0.1,null]}','2026-11-20 12:30:15.123456');
CREATE TABLE scores (
	score_set VARCHAR NOT NULL, 
	layer VARCHAR NOT NULL, 
	scheme VARCHAR NOT NULL, 
	metric VARCHAR NOT NULL, 
	value DOUBLE NOT NULL, 
	stderr DOUBLE, 
	samples BIGINT NOT NULL, 
	unit_key VARCHAR NOT NULL, 
	CONSTRAINT pk_scores PRIMARY KEY (score_set, layer, scheme, metric), 
	CONSTRAINT fk_scores_score_set_score_sets FOREIGN KEY(score_set) REFERENCES score_sets (digest)
);
INSERT INTO "scores" VALUES('s1','a','w4','output_kl',3.00000000000000044408e-01,NULL,7,'unit_key-1');
CREATE TABLE tenants (
	name VARCHAR NOT NULL, 
	quota_jobs BIGINT, 
	quota_bytes BIGINT, 
	quota_running BIGINT, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_tenants PRIMARY KEY (name)
);
INSERT INTO "tenants" VALUES('name-1',7,7,7,'2026-11-20 12:30:15.123456');
CREATE TABLE units (
	score_set VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	unit JSON NOT NULL, 
	facts JSON NOT NULL, 
	artifact VARCHAR, 
	job_id VARCHAR, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_units PRIMARY KEY (score_set, "key"), 
	CONSTRAINT fk_units_score_set_score_sets FOREIGN KEY(score_set) REFERENCES score_sets (digest)
);
INSERT INTO "units" VALUES('s1','score:a:w4:output_kl','score','{"ü":[1,0.1,null]}','{"ü":[1,0.1,null]}','9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f','job_id-1','2026-11-20 12:30:15.123456');
CREATE TABLE uploads (
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	purpose VARCHAR NOT NULL, 
	manifest JSON NOT NULL, 
	state VARCHAR NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_uploads PRIMARY KEY (id)
);
INSERT INTO "uploads" VALUES('upload_1','default','model','[{"path":"w","size":3,"sha256":"9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f"}]','open','2026-11-20 12:30:15.123456');
CREATE TABLE webhooks (
	id VARCHAR NOT NULL, 
	job_id VARCHAR NOT NULL, 
	url VARCHAR NOT NULL, 
	secret VARCHAR, 
	state VARCHAR NOT NULL, 
	attempts INTEGER NOT NULL, 
	next_attempt_at DOUBLE, 
	last_status INTEGER, 
	last_error VARCHAR, 
	created_at DATETIME NOT NULL, 
	settled_at DATETIME, 
	CONSTRAINT pk_webhooks PRIMARY KEY (id), 
	CONSTRAINT fk_webhooks_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_webhooks_job_id UNIQUE (job_id)
);
INSERT INTO "webhooks" VALUES('id-1','job_1','url-1','secret-1','state-1',7,1700000000.0,7,'last_error-1','2026-11-20 12:30:15.123456','2026-11-20 12:30:15.123456');
CREATE INDEX ix_calibrations_tenant_created_at_id ON calibrations (tenant, created_at, id);
CREATE INDEX ix_calibrations_tenant_digest ON calibrations (tenant, digest);
CREATE INDEX ix_models_tenant_created_at_id ON models (tenant, created_at, id);
CREATE INDEX ix_models_tenant_digest ON models (tenant, digest);
CREATE INDEX ix_faults_score_set ON faults (score_set);
CREATE INDEX ix_jobs_score_set ON jobs (score_set);
CREATE INDEX ix_jobs_state_created_at_id ON jobs (state, created_at, id);
CREATE UNIQUE INDEX uq_events_terminal ON events (job_id) WHERE type IN ('succeeded', 'failed', 'cancelled', 'expired');
CREATE INDEX ix_units_artifact ON units (artifact);
CREATE INDEX ix_audit_tenant_created_at_id ON audit (tenant, created_at, id);
CREATE INDEX ix_webhooks_state_next_attempt_at ON webhooks (state, next_attempt_at);
CREATE INDEX ix_jobs_tenant_kind_created_at_id ON jobs (tenant, kind, created_at, id);
CREATE INDEX ix_jobs_tenant_state_kind_created_at_id ON jobs (tenant, state, kind, created_at, id);
CREATE INDEX ix_jobs_tenant_request_digest ON jobs (tenant, request_digest);
CREATE INDEX ix_plans_job_id_created_at_id ON plans (job_id, created_at, id);
COMMIT;
