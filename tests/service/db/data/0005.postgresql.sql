CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.api_keys (
    id character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    name character varying NOT NULL COLLATE pg_catalog."C",
    scope character varying NOT NULL COLLATE pg_catalog."C",
    prefix character varying NOT NULL COLLATE pg_catalog."C",
    digest character varying NOT NULL COLLATE pg_catalog."C",
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone
);
CREATE TABLE public.attempts (
    job_id character varying NOT NULL COLLATE pg_catalog."C",
    unit_key character varying NOT NULL COLLATE pg_catalog."C",
    attempts integer NOT NULL,
    last_failure json NOT NULL
);
CREATE TABLE public.audit (
    id character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    key_id character varying COLLATE pg_catalog."C",
    peer character varying COLLATE pg_catalog."C",
    action character varying NOT NULL COLLATE pg_catalog."C",
    method character varying NOT NULL COLLATE pg_catalog."C",
    path character varying NOT NULL COLLATE pg_catalog."C",
    request_id character varying NOT NULL COLLATE pg_catalog."C",
    status integer,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.blobs (
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    sha256 character varying NOT NULL COLLATE pg_catalog."C",
    size bigint NOT NULL,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.calibrations (
    id character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    source json NOT NULL,
    digest character varying NOT NULL COLLATE pg_catalog."C",
    kind character varying NOT NULL COLLATE pg_catalog."C",
    state character varying NOT NULL COLLATE pg_catalog."C",
    problem json,
    summary json,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.events (
    job_id character varying NOT NULL COLLATE pg_catalog."C",
    seq bigint NOT NULL,
    type character varying NOT NULL COLLATE pg_catalog."C",
    data json NOT NULL,
    at timestamp with time zone NOT NULL
);
CREATE TABLE public.faults (
    id character varying NOT NULL COLLATE pg_catalog."C",
    score_set character varying NOT NULL COLLATE pg_catalog."C",
    unit_key character varying NOT NULL COLLATE pg_catalog."C",
    kept json NOT NULL,
    got json NOT NULL,
    at timestamp with time zone NOT NULL
);
CREATE TABLE public.idempotency_keys (
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    key character varying NOT NULL COLLATE pg_catalog."C",
    request_digest character varying NOT NULL COLLATE pg_catalog."C",
    status integer,
    body json,
    headers json NOT NULL,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.jobs (
    id character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    kind character varying NOT NULL COLLATE pg_catalog."C",
    state character varying NOT NULL COLLATE pg_catalog."C",
    stage character varying COLLATE pg_catalog."C",
    done bigint NOT NULL,
    total bigint NOT NULL,
    eta_seconds double precision,
    request json NOT NULL,
    request_digest character varying NOT NULL COLLATE pg_catalog."C",
    score_set character varying COLLATE pg_catalog."C",
    summary json,
    problem json,
    epoch bigint NOT NULL,
    lease_owner character varying COLLATE pg_catalog."C",
    lease_host character varying COLLATE pg_catalog."C",
    lease_pid integer,
    lease_process character varying COLLATE pg_catalog."C",
    lease_expires_at double precision,
    cancel_requested boolean NOT NULL,
    predecessor character varying COLLATE pg_catalog."C",
    version bigint NOT NULL,
    created_at timestamp with time zone NOT NULL,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    inventory json
);
CREATE TABLE public.models (
    id character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    source json NOT NULL,
    digest character varying NOT NULL COLLATE pg_catalog."C",
    state character varying NOT NULL COLLATE pg_catalog."C",
    problem json,
    summary json,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.plans (
    id character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    job_id character varying NOT NULL COLLATE pg_catalog."C",
    budget character varying NOT NULL COLLATE pg_catalog."C",
    settings_digest character varying NOT NULL COLLATE pg_catalog."C",
    digest character varying COLLATE pg_catalog."C",
    status character varying NOT NULL COLLATE pg_catalog."C",
    document json,
    result json NOT NULL,
    evidence json,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.runners (
    name character varying NOT NULL COLLATE pg_catalog."C",
    host character varying NOT NULL COLLATE pg_catalog."C",
    pid integer NOT NULL,
    process character varying NOT NULL COLLATE pg_catalog."C",
    version character varying NOT NULL COLLATE pg_catalog."C",
    started_at timestamp with time zone NOT NULL,
    seen_at double precision NOT NULL,
    metrics character varying NOT NULL COLLATE pg_catalog."C"
);
CREATE TABLE public.score_sets (
    digest character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    settings json NOT NULL,
    inspection json,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.scores (
    score_set character varying NOT NULL COLLATE pg_catalog."C",
    layer character varying NOT NULL COLLATE pg_catalog."C",
    scheme character varying NOT NULL COLLATE pg_catalog."C",
    metric character varying NOT NULL COLLATE pg_catalog."C",
    value double precision NOT NULL,
    stderr double precision,
    samples bigint NOT NULL,
    unit_key character varying NOT NULL COLLATE pg_catalog."C"
);
CREATE TABLE public.tenants (
    name character varying NOT NULL COLLATE pg_catalog."C",
    quota_jobs bigint,
    quota_bytes bigint,
    quota_running bigint,
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.units (
    score_set character varying NOT NULL COLLATE pg_catalog."C",
    key character varying NOT NULL COLLATE pg_catalog."C",
    kind character varying NOT NULL COLLATE pg_catalog."C",
    unit json NOT NULL,
    facts json NOT NULL,
    artifact character varying COLLATE pg_catalog."C",
    job_id character varying COLLATE pg_catalog."C",
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.uploads (
    id character varying NOT NULL COLLATE pg_catalog."C",
    tenant character varying NOT NULL COLLATE pg_catalog."C",
    purpose character varying NOT NULL COLLATE pg_catalog."C",
    manifest json NOT NULL,
    state character varying NOT NULL COLLATE pg_catalog."C",
    created_at timestamp with time zone NOT NULL
);
CREATE TABLE public.webhooks (
    id character varying NOT NULL COLLATE pg_catalog."C",
    job_id character varying NOT NULL COLLATE pg_catalog."C",
    url character varying NOT NULL COLLATE pg_catalog."C",
    secret character varying COLLATE pg_catalog."C",
    state character varying NOT NULL COLLATE pg_catalog."C",
    attempts integer NOT NULL,
    next_attempt_at double precision,
    last_status integer,
    last_error character varying COLLATE pg_catalog."C",
    created_at timestamp with time zone NOT NULL,
    settled_at timestamp with time zone
);
INSERT INTO public.alembic_version VALUES ('0005');
INSERT INTO public.api_keys VALUES ('id-1', 'name-1', 'name-1', 'scope-1', 'prefix-1', 'digest-1', '2026-11-20 12:30:15.123456+00', '2026-11-20 12:30:15.123456+00', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.attempts VALUES ('job_1', 'unit_key-1', 7, '{"ü":[1,0.1,null]}');
INSERT INTO public.audit VALUES ('id-1', 'default', 'key_id-1', 'peer-1', 'action-1', 'method-1', 'path-1', 'request_id-1', 7, '2026-11-20 12:30:15.123456+00');
INSERT INTO public.blobs VALUES ('default', '9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f', 1099511627776, '2026-11-20 12:30:15.123456+00');
INSERT INTO public.calibrations VALUES ('cal_1', 'default', '{"kind":"upload","files":[]}', 'cd', 'text', 'ready', '{"ü":[1,0.1,null]}', '{"ü":[1,0.1,null]}', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.events VALUES ('job_1', 1, 'queued', '{}', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.faults VALUES ('id-1', 's1', 'unit_key-1', '{"ü":[1,0.1,null]}', '{"ü":[1,0.1,null]}', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.idempotency_keys VALUES ('default', 'key-1', 'request_digest-1', 7, '{"ü":[1,0.1,null]}', '{"ü":[1,0.1,null]}', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.jobs VALUES ('job_1', 'default', 'search', 'succeeded', 'measuring', 7, 7, 1700000000, '{"model":"model_1","calibration":"cal_1","budgets":["3.5 bpw"],"schemes":["w4"],"metrics":["output_kl"]}', 'request_digest-1', 's1', '{"b":1,"a":{"z":0.1,"y":3.0}}', '{"ü":[1,0.1,null]}', 7, 'lease_owner-1', 'lease_host-1', 7, 'lease_process-1', 1700000000, true, 'predecessor-1', 7, '2026-11-20 12:30:15.123456+00', '2026-11-20 12:30:15.123456+00', '2026-11-20 12:30:15.123456+00', '{"ü":[1,0.1,null]}');
INSERT INTO public.jobs VALUES ('job_2', 'default', 'search', 'running', NULL, 7, 7, 1700000000, '{"model":"model_1","calibration":"cal_1","budgets":["3.5 bpw"],"schemes":["w4"],"metrics":["output_kl"]}', 'request_digest-1', NULL, '{"ü":[1,0.1,null]}', '{"ü":[1,0.1,null]}', 7, 'lease_owner-1', 'lease_host-1', 7, 'lease_process-1', 1500000000, true, 'predecessor-1', 7, '2026-11-20 12:30:15.123456+00', '2026-11-20 12:30:15.123456+00', '2026-11-20 12:30:15.123456+00', '{"ü":[1,0.1,null]}');
INSERT INTO public.models VALUES ('model_1', 'default', '{"kind":"upload","files":[]}', 'ab', 'ready', '{"ü":[1,0.1,null]}', '{"ü":[1,0.1,null]}', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.plans VALUES ('plan_1', 'default', 'job_1', '3.5 bpw', 'settings_digest-1', 'digest-1', 'optimal', '{"v":1}', '{"ü":[1,0.1,null]}', '{"ü":[1,0.1,null]}', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.runners VALUES ('name-1', 'host-1', 7, 'process-1', 'version-1', '2026-11-20 12:30:15.123456+00', 1700000000, 'metrics-1');
INSERT INTO public.score_sets VALUES ('s1', 'default', '{"model":"ab","seed":0}', '{"é":[0.1,null]}', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.scores VALUES ('s1', 'a', 'w4', 'output_kl', 0.30000000000000004, NULL, 7, 'unit_key-1');
INSERT INTO public.tenants VALUES ('name-1', 7, 7, 7, '2026-11-20 12:30:15.123456+00');
INSERT INTO public.units VALUES ('s1', 'score:a:w4:output_kl', 'score', '{"ü":[1,0.1,null]}', '{"ü":[1,0.1,null]}', '9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f', 'job_id-1', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.uploads VALUES ('upload_1', 'default', 'model', '[{"path":"w","size":3,"sha256":"9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f"}]', 'open', '2026-11-20 12:30:15.123456+00');
INSERT INTO public.webhooks VALUES ('id-1', 'job_1', 'url-1', 'secret-1', 'state-1', 7, 1700000000, 7, 'last_error-1', '2026-11-20 12:30:15.123456+00', '2026-11-20 12:30:15.123456+00');
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT pk_api_keys PRIMARY KEY (id);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT pk_attempts PRIMARY KEY (job_id, unit_key);
ALTER TABLE ONLY public.audit
    ADD CONSTRAINT pk_audit PRIMARY KEY (id);
ALTER TABLE ONLY public.blobs
    ADD CONSTRAINT pk_blobs PRIMARY KEY (tenant, sha256);
ALTER TABLE ONLY public.calibrations
    ADD CONSTRAINT pk_calibrations PRIMARY KEY (id);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT pk_events PRIMARY KEY (job_id, seq);
ALTER TABLE ONLY public.faults
    ADD CONSTRAINT pk_faults PRIMARY KEY (id);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT pk_idempotency_keys PRIMARY KEY (tenant, key);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT pk_jobs PRIMARY KEY (id);
ALTER TABLE ONLY public.models
    ADD CONSTRAINT pk_models PRIMARY KEY (id);
ALTER TABLE ONLY public.plans
    ADD CONSTRAINT pk_plans PRIMARY KEY (id);
ALTER TABLE ONLY public.runners
    ADD CONSTRAINT pk_runners PRIMARY KEY (name);
ALTER TABLE ONLY public.score_sets
    ADD CONSTRAINT pk_score_sets PRIMARY KEY (digest);
ALTER TABLE ONLY public.scores
    ADD CONSTRAINT pk_scores PRIMARY KEY (score_set, layer, scheme, metric);
ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT pk_tenants PRIMARY KEY (name);
ALTER TABLE ONLY public.units
    ADD CONSTRAINT pk_units PRIMARY KEY (score_set, key);
ALTER TABLE ONLY public.uploads
    ADD CONSTRAINT pk_uploads PRIMARY KEY (id);
ALTER TABLE ONLY public.webhooks
    ADD CONSTRAINT pk_webhooks PRIMARY KEY (id);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT uq_api_keys_prefix UNIQUE (prefix);
ALTER TABLE ONLY public.plans
    ADD CONSTRAINT uq_plans_job_id_budget_settings_digest UNIQUE (job_id, budget, settings_digest);
ALTER TABLE ONLY public.webhooks
    ADD CONSTRAINT uq_webhooks_job_id UNIQUE (job_id);
CREATE INDEX ix_audit_tenant_created_at_id ON public.audit USING btree (tenant, created_at, id);
CREATE INDEX ix_calibrations_tenant_created_at_id ON public.calibrations USING btree (tenant, created_at, id);
CREATE INDEX ix_calibrations_tenant_digest ON public.calibrations USING btree (tenant, digest);
CREATE INDEX ix_faults_score_set ON public.faults USING btree (score_set);
CREATE INDEX ix_jobs_score_set ON public.jobs USING btree (score_set);
CREATE INDEX ix_jobs_state_created_at_id ON public.jobs USING btree (state, created_at, id);
CREATE INDEX ix_jobs_tenant_kind_created_at_id ON public.jobs USING btree (tenant, kind, created_at, id);
CREATE INDEX ix_jobs_tenant_request_digest ON public.jobs USING btree (tenant, request_digest);
CREATE INDEX ix_jobs_tenant_state_kind_created_at_id ON public.jobs USING btree (tenant, state, kind, created_at, id);
CREATE INDEX ix_models_tenant_created_at_id ON public.models USING btree (tenant, created_at, id);
CREATE INDEX ix_models_tenant_digest ON public.models USING btree (tenant, digest);
CREATE INDEX ix_plans_job_id_created_at_id ON public.plans USING btree (job_id, created_at, id);
CREATE INDEX ix_units_artifact ON public.units USING btree (artifact);
CREATE INDEX ix_webhooks_state_next_attempt_at ON public.webhooks USING btree (state, next_attempt_at);
CREATE UNIQUE INDEX uq_events_terminal ON public.events USING btree (job_id) WHERE ((type)::text = ANY ((ARRAY['succeeded'::character varying, 'failed'::character varying, 'cancelled'::character varying, 'expired'::character varying])::text[]));
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT fk_api_keys_tenant_tenants FOREIGN KEY (tenant) REFERENCES public.tenants(name);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT fk_attempts_job_id_jobs FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.events
    ADD CONSTRAINT fk_events_job_id_jobs FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.faults
    ADD CONSTRAINT fk_faults_score_set_score_sets FOREIGN KEY (score_set) REFERENCES public.score_sets(digest);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_score_set_score_sets FOREIGN KEY (score_set) REFERENCES public.score_sets(digest);
ALTER TABLE ONLY public.plans
    ADD CONSTRAINT fk_plans_job_id_jobs FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.scores
    ADD CONSTRAINT fk_scores_score_set_score_sets FOREIGN KEY (score_set) REFERENCES public.score_sets(digest);
ALTER TABLE ONLY public.units
    ADD CONSTRAINT fk_units_score_set_score_sets FOREIGN KEY (score_set) REFERENCES public.score_sets(digest);
ALTER TABLE ONLY public.webhooks
    ADD CONSTRAINT fk_webhooks_job_id_jobs FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
