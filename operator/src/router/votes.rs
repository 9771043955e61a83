//! What proxies say of a step: who must have it before it has arrived, and who is skipped after a while.
//!
//! A proxy is its namespace's to configure: one of another namespace, by malice or a broken filter, would otherwise keep the service's owner from any change.

use std::collections::BTreeMap;
use std::time::Duration;

use super::arrival::{Expectation, few};
use super::istiod::{ProxyState, Push};
use crate::world::Key;

/// Once istiod has sent a step, proxies that it sends nothing for so long are not concerned by it.
const UNCONCERNED: Duration = Duration::from_secs(10);
/// How many of the skipped a status names.
const NAMED: usize = 10;
/// What a proxy says is its namespace's to choose: so many characters of it are repeated.
const REPEATED: usize = 200;

/// Proxies of other namespaces that do not have a step, each with why it refused it, if it said so.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skipped(BTreeMap<Key, Option<String>>);

impl Skipped {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Those that are in another too.
    #[must_use]
    pub(super) fn only(mut self, other: &Self) -> Self {
        self.0.retain(|pod, _| other.0.contains_key(pod));
        self
    }

    /// In words.
    pub(super) fn say(&self) -> String {
        let of = |(pod, why): (&Key, &Option<String>)| match why {
            Some(why) => format!("{pod} (refuses it: {why})"),
            None => format!("{pod} (does not answer)"),
        };
        let named: Vec<String> = self.0.iter().take(NAMED).map(of).collect();
        let more = match self.len() - named.len() {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        format!(
            "every proxy has it, but for {} of other namespaces, which were skipped after spec.change.others: {}{more}. They keep what they had, \
             and the subsets that it leads to stay while there are pods of them",
            self.len(),
            named.join(", ")
        )
    }
}

/// What was found out so far of the proxies of every istiod.
#[derive(Debug, Default)]
pub(super) struct Votes {
    concerned: usize,
    refused: Vec<String>,
    waiting: Vec<String>,
    /// Of other namespaces, while their time is not over.
    others: Vec<String>,
    skipped: Skipped,
}

enum Vote {
    Has,
    Waits,
    Refuses(String),
}

impl Votes {
    /// Counts the proxies of an istiod that sent the step with a push, so long ago; those of other namespaces have the time `others`.
    pub(super) fn take(
        &mut self,
        concerned: &[&ProxyState],
        expectation: &Expectation,
        push: Push,
        sent: Duration,
        others: Duration,
    ) {
        self.concerned += concerned.len();
        for proxy in concerned {
            let vote = vote(proxy, expectation, push, sent);
            let owned = |pod: &Key| expectation.owners.contains(&pod.namespace);
            let other = proxy.pod().filter(|pod| !owned(pod));
            match (vote, other) {
                (Vote::Has, _) => {}
                (Vote::Refuses(why), None) => self.refused.push(format!("{}: {why}", proxy.id)),
                (Vote::Waits, None) => self.waiting.push(proxy.id.clone()),
                (_, Some(_)) if sent < others => self.others.push(proxy.id.clone()),
                (Vote::Refuses(why), Some(pod)) => drop(self.skipped.0.insert(pod, Some(why))),
                (Vote::Waits, Some(pod)) => drop(self.skipped.0.insert(pod, None)),
            }
        }
    }

    /// Why the step must be taken back.
    pub(super) fn refused(&self) -> Option<String> {
        (!self.refused.is_empty()).then(|| {
            format!(
                "{} proxies refused it: {}",
                self.refused.len(),
                few(&self.refused)
            )
        })
    }

    /// Why it has not arrived.
    pub(super) fn waits(&self) -> Vec<String> {
        let mut waits = Vec::new();
        for (proxies, whose) in [
            (&self.waiting, "proxies"),
            (&self.others, "proxies, of other namespaces,"),
        ] {
            if !proxies.is_empty() {
                waits.push(format!(
                    "{} of {} {whose} have not got it: {}",
                    proxies.len(),
                    self.concerned,
                    few(proxies)
                ));
            }
        }
        waits
    }

    pub(super) fn skipped(self) -> Skipped {
        self.skipped
    }
}

fn vote(proxy: &ProxyState, expectation: &Expectation, push: Push, sent: Duration) -> Vote {
    let mut vote = Vote::Has;
    for kind in expectation.kinds() {
        if let Some(why) = proxy.refused(kind)
            && proxy.sent(kind) >= Some(push)
        {
            let why = why.chars().filter(|letter| !letter.is_control());
            return Vote::Refuses(why.take(REPEATED).collect());
        }
        let acknowledged = proxy.acknowledged(kind);
        // istiod sends a proxy nothing where nothing changes for it.
        let idle = acknowledged.is_some() || !proxy.takes(kind);
        let unconcerned = idle && sent > UNCONCERNED;
        if acknowledged < Some(push) && !unconcerned {
            vote = Vote::Waits;
        }
    }
    vote
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::router::istiod::{Kind, Wanted};

    const OTHERS: Duration = Duration::from_secs(30);

    fn expectation() -> Expectation {
        Expectation {
            service: Key::new("bank", "vault"),
            fqdn: "vault.bank.svc.cluster.local".into(),
            wanted: vec![Wanted {
                kind: Kind::Routes,
                name: "main.1".into(),
                there: true,
            }],
            hidden: BTreeSet::new(),
            owners: ["bank".to_owned(), "shop".to_owned()].into(),
        }
    }

    /// A proxy that was sent push 7, and acknowledged this one.
    fn proxy(id: &str, acknowledged: u64, error: &str) -> ProxyState {
        let nonce = |push: u64| format!("t/{push}0c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a11");
        let routes =
            serde_json::json!({"sent": nonce(7), "acked": nonce(acknowledged), "lastError": error});
        let resources = serde_json::json!({Kind::Routes.type_url(): routes});
        serde_json::from_value(serde_json::json!({"proxy": id, "resources": resources})).unwrap()
    }

    fn votes(proxies: &[ProxyState], seconds: u64) -> Votes {
        let mut votes = Votes::default();
        let all: Vec<&ProxyState> = proxies.iter().collect();
        votes.take(
            &all,
            &expectation(),
            7,
            Duration::from_secs(seconds),
            OTHERS,
        );
        votes
    }

    #[test]
    fn another_namespaces_proxy_is_waited_for_a_while_and_then_skipped() {
        let proxies = [
            proxy("till.bank", 7, ""),
            proxy("no.evil", 6, "no\nsuch"),
            proxy("mute.evil", 6, ""),
        ];
        let early = votes(&proxies, 29);
        assert_eq!(early.refused(), None);
        assert_eq!(
            early.waits(),
            ["2 of 3 proxies, of other namespaces, have not got it: no.evil, mute.evil"]
        );
        let late = votes(&proxies, 30);
        assert_eq!((late.refused(), late.waits().len()), (None, 0));
        let skipped = late.skipped();
        assert_eq!(skipped.len(), 2);
        let said = skipped.say();
        assert!(
            said.contains("evil/mute (does not answer), evil/no (refuses it: nosuch)"),
            "{said}"
        );
    }

    #[test]
    fn owners_and_named_callers_keep_their_veto() {
        for namespace in ["bank", "shop"] {
            let refuses = [proxy(&format!("a.{namespace}"), 6, "no")];
            let refused = votes(&refuses, 0).refused().unwrap();
            assert!(refused.contains(&format!("a.{namespace}: no")), "{refused}");
            let mute = [proxy(&format!("a.{namespace}"), 6, "")];
            let votes = votes(&mute, 3600);
            assert_eq!(votes.waits().len(), 1, "until spec.change.timeout");
            assert!(votes.skipped().is_empty());
        }
    }

    #[test]
    fn however_many_are_skipped_ten_are_named_and_little_is_repeated() {
        let long = "x".repeat(10_000);
        let proxies: Vec<ProxyState> = (0..500)
            .map(|number| proxy(&format!("p{number}.evil"), 6, &long))
            .collect();
        let skipped = votes(&proxies, 30).skipped();
        let said = skipped.say();
        assert!(said.contains("for 500 of other namespaces") && said.contains("and 490 more"));
        assert!(said.len() < 4_000, "{}", said.len());
    }

    #[test]
    fn who_has_it_by_now_is_skipped_no_more_and_nobody_is_added() {
        let then = votes(&[proxy("a.evil", 6, ""), proxy("b.evil", 6, "")], 30).skipped();
        let now = votes(
            &[
                proxy("a.evil", 7, ""),
                proxy("b.evil", 6, ""),
                proxy("c.evil", 6, ""),
            ],
            30,
        );
        let still = now.skipped().only(&then);
        assert_eq!(still.0.keys().collect::<Vec<_>>(), [&Key::new("evil", "b")]);
    }
}
