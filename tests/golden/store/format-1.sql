BEGIN TRANSACTION;
CREATE TABLE candidate (
	search_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	origin VARCHAR(40) NOT NULL, 
	label VARCHAR(200) NOT NULL, 
	recipe_hash VARCHAR(64) NOT NULL, 
	status VARCHAR(10) NOT NULL, 
	same_as INTEGER, 
	attempts INTEGER NOT NULL, 
	worker VARCHAR(200) NOT NULL, 
	on_front BOOLEAN DEFAULT 0 NOT NULL, 
	losses TEXT, 
	timings TEXT, 
	failure TEXT, 
	asked_at DOUBLE NOT NULL, 
	finished_at DOUBLE, 
	PRIMARY KEY (search_id, number)
);
INSERT INTO "candidate" VALUES(1,0,0,'landmark','数学 alone','hash0','done',NULL,1,'worker-0',0,'[-0.3333333333333333]','{"merge":0.5}',NULL,1.79529122969851517681e+09,1.79529122971843385701e+09);
INSERT INTO "candidate" VALUES(1,1,0,'cma','','hash1','failed',NULL,1,'worker-0',0,'[{"$float":"inf"}]',NULL,'{"reason":"nan","message":"not finite"}',1.79529122969851517681e+09,1.79529122972765111925e+09);
INSERT INTO "candidate" VALUES(1,2,0,'cma','','hash2','running',NULL,1,'worker-0',0,NULL,NULL,NULL,1.79529122969851517681e+09,NULL);
INSERT INTO "candidate" VALUES(1,3,0,'cma','','hash0','cached',0,0,'',0,'[-0.3333333333333333]',NULL,NULL,1.79529122969851517681e+09,1.7952912297374956608e+09);
INSERT INTO "candidate" VALUES(1,4,0,'cma','','hash4','asked',NULL,0,'',0,NULL,NULL,NULL,1.79529122969851517681e+09,NULL);
INSERT INTO "candidate" VALUES(1,5,0,'cma','','hash5','done',NULL,1,'worker-0',1,'[-0.6666666666666666]','{"merge":0.5}',NULL,1.79529122969851517681e+09,1.79529122972580194471e+09);
CREATE TABLE command (
	id INTEGER NOT NULL, 
	search_id INTEGER NOT NULL, 
	verb VARCHAR(20) NOT NULL, 
	requested_at DOUBLE NOT NULL, 
	taken_at DOUBLE, 
	PRIMARY KEY (id)
);
INSERT INTO "command" VALUES(1,1,'stop',1.79529122974646139143e+09,1.79529122975639486309e+09);
CREATE TABLE event (
	seq INTEGER NOT NULL, 
	search_id INTEGER NOT NULL, 
	time DOUBLE NOT NULL, 
	kind VARCHAR(40) NOT NULL, 
	candidate INTEGER, 
	attempt INTEGER, 
	payload TEXT NOT NULL, 
	PRIMARY KEY (seq)
);
INSERT INTO "event" VALUES(1,1,1.79529122965975475312e+09,'created',NULL,NULL,'{}');
INSERT INTO "event" VALUES(2,1,1795291229.69654,'lease',NULL,NULL,'{"epoch":1,"host":"node-7","pid":4242}');
INSERT INTO "event" VALUES(3,1,1.79529122969824695582e+09,'state',NULL,NULL,'{"state":"running","why":""}');
INSERT INTO "event" VALUES(4,1,1.79529122970427370067e+09,'ask',NULL,NULL,'{"step":0,"candidates":[0,1,2,3,4,5]}');
INSERT INTO "event" VALUES(5,1,1.79529122970583033562e+09,'dispatch',0,1,'{"worker":"worker-0"}');
INSERT INTO "event" VALUES(6,1,1.79529122971601843832e+09,'dispatch',1,1,'{"worker":"worker-0"}');
INSERT INTO "event" VALUES(7,1,1.79529122971717500691e+09,'dispatch',2,1,'{"worker":"worker-0"}');
INSERT INTO "event" VALUES(8,1,1.79529122971797084804e+09,'dispatch',5,1,'{"worker":"worker-0"}');
INSERT INTO "event" VALUES(9,1,1.7952912297252063751e+09,'result',0,1,'{"worker":"worker-0"}');
INSERT INTO "event" VALUES(10,1,1.79529122972672414777e+09,'result',5,1,'{"worker":"worker-0"}');
INSERT INTO "event" VALUES(11,1,1.79529122972749590868e+09,'scores',0,1,'{"scores":[["task@1","held_out",3]]}');
INSERT INTO "event" VALUES(12,1,1.79529122973698115352e+09,'failure',1,1,'{"reason":"nan","message":"not finite","final":true}');
INSERT INTO "event" VALUES(13,1,1.79529122973823881143e+09,'cached',3,NULL,'{"same_as":0}');
INSERT INTO "event" VALUES(14,1,1.79529122974575567252e+09,'front',NULL,NULL,'{"candidates":[5]}');
INSERT INTO "event" VALUES(15,1,1.79529122974626588818e+09,'tell',NULL,NULL,'{"step":0,"candidates":[0,1,3,5]}');
INSERT INTO "event" VALUES(16,1,1.7952912297567791939e+09,'command',NULL,NULL,'{"verb":"stop"}');
INSERT INTO "event" VALUES(17,1,1.79529122975747585299e+09,'state',NULL,NULL,'{"state":"stopped","why":"asked to stop"}');
CREATE TABLE lease (
	search_id INTEGER NOT NULL, 
	epoch INTEGER NOT NULL, 
	host VARCHAR(255), 
	namespace VARCHAR(100), 
	pid INTEGER, 
	started DOUBLE, 
	acquired_at DOUBLE, 
	expires_at DOUBLE, 
	PRIMARY KEY (search_id)
);
INSERT INTO "lease" VALUES(1,1,NULL,'pid:[1]',4242,1.0,1795291229.0,1795291289.0);
CREATE TABLE objective (
	search_id INTEGER NOT NULL, 
	candidate INTEGER NOT NULL, 
	name VARCHAR(100) NOT NULL, 
	mean DOUBLE, 
	stderr DOUBLE, 
	n INTEGER NOT NULL, 
	PRIMARY KEY (search_id, candidate, name)
);
INSERT INTO "objective" VALUES(1,0,'acc',3.33333333333333314829e-01,0.125,3);
INSERT INTO "objective" VALUES(1,5,'acc',6.66666666666666629659e-01,0.125,3);
INSERT INTO "objective" VALUES(1,3,'acc',3.33333333333333314829e-01,0.125,3);
CREATE TABLE recipe (
	search_id INTEGER NOT NULL, 
	candidate INTEGER NOT NULL, 
	genome BLOB, 
	recipe BLOB NOT NULL, 
	PRIMARY KEY (search_id, candidate)
);
INSERT INTO "recipe" VALUES(1,0,X'0000000000000000343333333333D33F59F3F8C21F6EA581',X'789CAB562A4E4D4D51B232A8050012CA0348');
INSERT INTO "recipe" VALUES(1,1,NULL,X'789CAB562A4E4D4D51B232AC050012CC0349');
INSERT INTO "recipe" VALUES(1,2,X'0000000000000040343333333333D33F59F3F8C21F6EA581',X'789CAB562A4E4D4D51B232AA050012CE034A');
INSERT INTO "recipe" VALUES(1,3,X'0000000000000840343333333333D33F59F3F8C21F6EA581',X'789CAB562A4E4D4D51B232AE050012D0034B');
INSERT INTO "recipe" VALUES(1,4,X'0000000000001040343333333333D33F59F3F8C21F6EA581',X'789CAB562A4E4D4D51B232A9050012D2034C');
INSERT INTO "recipe" VALUES(1,5,X'0000000000001440343333333333D33F59F3F8C21F6EA581',X'789CAB562A4E4D4D51B232AD050012D4034D');
CREATE TABLE score (
	search_id INTEGER NOT NULL, 
	candidate INTEGER NOT NULL, 
	evaluator VARCHAR(200) NOT NULL, 
	split VARCHAR(20) NOT NULL, 
	items BLOB NOT NULL, 
	metrics TEXT NOT NULL, 
	scores BLOB NOT NULL, 
	PRIMARY KEY (search_id, candidate, evaluator, split)
);
INSERT INTO "score" VALUES(1,0,'task@1','search',X'040000000000000007000000','["acc","chrf"]',X'00000000ABAAAA3E0000807F0000807FABAAAA3E00000000');
INSERT INTO "score" VALUES(1,5,'task@1','search',X'040000000000000007000000','["acc","chrf"]',X'00000040ABAAAA3E0000807F0000807FABAAAA3E00000040');
INSERT INTO "score" VALUES(1,0,'task@1','held_out',X'040000000000000007000000','["acc","chrf"]',X'0000803FABAAAA3E0000807F0000807FABAAAA3E0000803F');
CREATE TABLE search (
	id INTEGER NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	schema_version INTEGER NOT NULL, 
	created_at DOUBLE NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	why VARCHAR(500) DEFAULT '' NOT NULL, 
	spent_s DOUBLE DEFAULT '0' NOT NULL, 
	settings TEXT NOT NULL, 
	fingerprints TEXT NOT NULL, 
	environment TEXT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "search" VALUES(1,'unit',1,1.79529122965175962447e+09,'stopped','asked to stop',12.5,'{"name":"unit","budget":{"candidates":40},"bounds":[0.0,{"$float":"inf"}],"sources":{"maths":"\u6570\u5b66"}}','{"maths":"ab12"}','{"cma":"4"}');
CREATE INDEX candidate_by_hash ON candidate (search_id, recipe_hash, status, number);
CREATE INDEX candidate_by_status ON candidate (search_id, status, number);
CREATE INDEX candidate_by_origin ON candidate (search_id, origin, number);
CREATE INDEX candidate_by_step ON candidate (search_id, step, number);
CREATE INDEX candidate_by_front ON candidate (search_id, on_front, number);
CREATE INDEX objective_by_mean ON objective (search_id, name, mean);
CREATE INDEX event_by_kind ON event (search_id, kind, seq);
CREATE INDEX event_by_search ON event (search_id, seq);
CREATE INDEX command_by_search ON command (search_id, taken_at);
COMMIT;
