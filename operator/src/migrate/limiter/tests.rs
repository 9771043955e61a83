//! A SmartLimiter with most that there is.

use super::*;
use crate::migrate::migrate;
use jiff::Timestamp;

const SMART: &str = r"
apiVersion: microservice.slime.io/v1alpha2
kind: SmartLimiter
metadata: {name: reviews, namespace: default}
spec:
  sets:
    _base:
      descriptor:
      - condition: 'true'
        action: {quota: '100/{{._base.pod}}', fill_interval: {seconds: 1}, strategy: average}
        target: {port: 9080}
      - condition: '{{._base.cpu.sum}}>10'
        action: {quota: 5, fill_interval: {seconds: 60}, strategy: single, headers_to_add: [{key: x-limited, value: 'yes'}]}
        match:
        - {name: ':path', prefix_match: /api}
        - {name: ':method', exact_match: GET}
        - {name: x-user, present_match_separate: true}
        - {matchSource: SourceIpMatch, exact_match: '10.0.0.1,10.0.0.2'}
        - {name: name, matchSource: QueryMatch, suffix_match: son}
        target: {port: 9080}
      - condition: 'true'
        action: {quota: '10', fill_interval: {seconds: 60}, strategy: global}
        target: {direction: outbound, host: ['ratings.default.svc.cluster.local:9080']}
      - condition: 'true'
        action: {quota: '1000/{{._base.rt99}}', fill_interval: {seconds: 1}, strategy: single}
    v1:
      descriptor:
      - {condition: 'true', action: {quota: 1, fill_interval: {seconds: 1}, strategy: single}}
";

#[test]
fn every_field_of_a_smart_limiter_has_a_fate() {
    let migration = migrate(SMART, Timestamp::UNIX_EPOCH).unwrap();
    let report: Vec<String> = migration.report.iter().map(ToString::to_string).collect();
    for says in [
        "descriptor[0].action.quota: became limit.requests, of all replicas together",
        "descriptor[0].action.strategy: became spec.share: AcrossReplicas",
        "descriptor[1].condition: TO DO: when: metrics.cpu_sum>10.0",
        "descriptor[1].match[2]: became by",
        "descriptor[3].action.quota: TO DO: 1000/{{._base.rt99}} became adaptive.requests: 1000.0/metrics.rt99",
        "spec.sets[v1].descriptor[0]: TO DO: a limit for the subset v1 alone",
    ] {
        assert!(
            report.iter().any(|line| line.contains(says)),
            "{says}: {report:#?}"
        );
    }
    let limits: Vec<RateLimit> = migration
        .objects
        .iter()
        .map(|text| serde_yaml::from_str(text).unwrap())
        .collect();
    assert_eq!(limits.len(), 4, "{:#?}", migration.objects);
    let mut world = crate::testing::world();
    crate::testing::service(&mut world, "default", "reviews", "{}");
    for limit in &limits {
        crate::rate_limit::check(limit, &world).unwrap();
    }
    let with = |share: Share, port| {
        let mut all = limits.iter();
        &all.find(|one| one.spec.share == share && one.spec.port == port)
            .unwrap()
            .spec
    };
    let detailed = &with(Share::PerReplica, Some(9080)).rules[0];
    let matches = detailed.matches.as_ref().unwrap();
    assert_eq!(matches.methods, ["GET"]);
    assert_eq!(matches.cidrs, ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(matches.query[0].regex.as_deref(), Some(".*son"));
    assert_eq!(detailed.by[0].header.as_deref(), Some("x-user"));
    assert_eq!(detailed.limit.per, "60s");
    let global = with(Share::Global, None);
    assert_eq!(
        global.to.as_deref(),
        Some("ratings.default.svc.cluster.local")
    );
    assert_eq!(global.direction, Direction::Outbound);
}
