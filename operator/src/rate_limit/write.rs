//! What is written for a RateLimit, in which order, and what proxies make of it: a filter's place before its content, one thing at a time, and
//! back to what was good where it is refused.

use std::time::{Duration, Instant};

use fenceline_crds::istio::{EnvoyFilter, EnvoyFilterSpec};
use fenceline_crds::{RateLimit, RateLimitSpec, RuleStatus, Share};
use kube::ResourceExt;
use serde_json::json;

use super::plan::{self, Filter};
use super::proxies::{self, Before, Seen};
use super::report::Standing;
use super::valid::Limit;
use super::{ASK_SELDOM, Limits, services};
use crate::apply;
use crate::note::{self, Note};
use crate::router::plan::short_hash;
use crate::world::{Key, World};

/// Envoy says that it refuses what it got within moments; until then nobody can be sure.
const SETTLES: Duration = Duration::from_secs(2);
/// How long status waits before it says that something is on its way: most is there by then.
const SAID_AFTER: Duration = Duration::from_secs(5);
/// How long a change waits for the one before it.
const PATIENCE: Duration = Duration::from_secs(15);
/// What is waited for first.
const OPENING: &str = "its place in the proxies' listeners is on its way";
/// What may be wrong where a proxy does not get it for long.
const NEVER_ASKED: &str = "; a proxy without an HTTP listener that the limit is for never asks for it: look at spec.port, and at the ports' protocols";
/// How long a change waits where nobody can be asked.
const UNSEEN: Duration = Duration::from_secs(5);

/// What was written last, and not seen to have arrived.
#[derive(Clone, Debug)]
pub(super) struct OnTheWay {
    /// What it says, in short.
    mark: String,
    since: Instant,
    before: Before,
    /// When every proxy had it first.
    everywhere: Option<Instant>,
}

impl OnTheWay {
    pub(super) fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }
}

/// What was refused is not tried again until another spec is wanted, or another Fenceline makes something else of it.
fn mark_of_spec(spec: &RateLimitSpec) -> String {
    short_hash(&json!([spec, env!("CARGO_PKG_VERSION")]).to_string())
}

/// What an EnvoyFilter says, in short.
fn mark_of(spec: &EnvoyFilterSpec) -> String {
    short_hash(&json!(spec).to_string())
}

impl Limits {
    /// Makes the EnvoyFilter be as it should, unless proxies refused just that; with what it says, in short, once every proxy has it.
    pub(super) async fn carry_out(
        &self,
        object: &RateLimit,
        limit: &Limit,
        filters: &[Filter],
        world: &World,
    ) -> (Standing, Option<String>) {
        let name = Key::new(&*limit.key.namespace, plan::name(&limit.key.name));
        let stored = self.recent.newest(&name, world.envoy_filters.get(&name));
        let wanted = mark_of_spec(&object.spec);
        if let Some(why) = stored
            .as_deref()
            .and_then(|stored| note::refused(stored, &wanted))
        {
            return (Standing::Refused(why), None);
        }
        let said = self.proxies.said(world, ASK_SELDOM).await;
        if let Some(why) = proxies::unsupported(limit, world, &said) {
            return (Standing::Unsupported(why), None);
        }
        let Some(mut want) = plan::plan(object, limit, filters) else {
            return (self.take_away(&name, stored.as_deref()).await, None);
        };
        let mark = mark_of(&want.spec);
        if stored
            .as_deref()
            .is_none_or(|stored| stored.spec != want.spec)
        {
            // One thing at a time: what is refused is told by what came last.
            if let Some(standing) = self
                .still_comes(limit, filters, world, stored.as_deref())
                .await
            {
                return match standing {
                    Standing::Refused(why) => (
                        self.put_back(object, limit, stored.as_deref(), &why).await,
                        None,
                    ),
                    other => (other, None),
                };
            }
            let opening = plan::opening(&want.spec, stored.as_deref().map(|stored| &stored.spec));
            let opens = opening.is_some();
            want.spec = opening.unwrap_or(want.spec);
            let good = stored
                .as_deref()
                .filter(|stored| self.is_good(object, stored));
            want.metadata.annotations =
                Note::good(good.map(|stored| &stored.spec), stored.as_deref()).annotations();
            let before = proxies::before(self.proxies.said(world, Duration::ZERO).await.as_ref());
            if let Err(standing) = self.write(&name, &want, stored.as_deref()).await {
                return (standing, None);
            }
            self.lock().entry(limit.key.clone()).or_default().on_the_way = Some(OnTheWay {
                mark: mark_of(&want.spec),
                since: Instant::now(),
                before,
                everywhere: None,
            });
            if opens {
                return (Standing::OnTheWay(OPENING.to_owned(), false), None);
            }
        }
        let standing = match self.follow(limit, filters, world, &mark).await {
            Standing::Refused(why) => self.put_back(object, limit, stored.as_deref(), &why).await,
            Standing::InForce(seen) if limit.share == Share::Global => {
                services::standing(object, limit, &self.rules_of(limit).unwrap_or_default())
                    .unwrap_or(Standing::InForce(seen))
            }
            other => other,
        };
        let has = matches!(standing, Standing::InForce(_));
        (standing, has.then_some(mark))
    }

    /// What was decided last of its rules, since this replica leads.
    pub(super) fn rules_of(&self, limit: &Limit) -> Option<Vec<RuleStatus>> {
        let memory = self.lock();
        memory.get(&limit.key)?.rules.clone()
    }

    /// Whether what is stored was seen to be in force.
    fn is_good(&self, object: &RateLimit, stored: &EnvoyFilter) -> bool {
        let said = object
            .status
            .as_ref()
            .and_then(|status| status.in_force.as_deref());
        let mark = mark_of(&stored.spec);
        let memory = self.lock();
        let key = Key::new(object.namespace().unwrap_or_default(), object.name_any());
        let of = memory.get(&key);
        let on_the_way = of.and_then(|of| of.on_the_way.as_ref());
        let arrived = on_the_way.is_some_and(|it| it.mark == mark && it.everywhere.is_some());
        let seen = of.and_then(|of| of.in_force.as_deref());
        arrived || seen.or(said) == Some(&*mark)
    }

    async fn write(
        &self,
        name: &Key,
        want: &EnvoyFilter,
        have: Option<&EnvoyFilter>,
    ) -> Result<(), Standing> {
        match self.context.writer.ensure(want, have).await {
            Ok(Some(written)) => {
                self.recent.wrote(name, written);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(apply::Error::NotOurs { object, .. }) => Err(Standing::NameTaken(object)),
            Err(error) => Err(Standing::Failing(
                error.refusal().unwrap_or_else(|| crate::chain(&error)),
            )),
        }
    }

    /// No rule counts.
    async fn take_away(&self, name: &Key, stored: Option<&EnvoyFilter>) -> Standing {
        if let Some(stored) = stored {
            if let Err(error) = self.context.writer.remove(stored).await {
                return Standing::Failing(crate::chain(&error));
            }
            self.recent.removed(name);
        }
        Standing::InForce("no rule is in force at the moment".to_owned())
    }

    /// Where what was written last stands, as long as it has not arrived.
    async fn still_comes(
        &self,
        limit: &Limit,
        filters: &[Filter],
        world: &World,
        stored: Option<&EnvoyFilter>,
    ) -> Option<Standing> {
        let stored = mark_of(&stored?.spec);
        let on_the_way = self.lock().get(&limit.key)?.on_the_way.clone()?;
        if on_the_way.mark != stored
            || on_the_way.everywhere.is_some()
            || on_the_way.since.elapsed() > PATIENCE
        {
            return None;
        }
        match self.follow(limit, filters, world, &stored).await {
            // There, if not settled: that is for what can be refused.
            Standing::OnTheWay(..) if self.is_everywhere(limit) => None,
            Standing::InForce(_) => None,
            Standing::OnTheWay(..) => {
                let lasts = on_the_way.since.elapsed() > SAID_AFTER;
                Some(Standing::OnTheWay(OPENING.to_owned(), lasts))
            }
            other => Some(other),
        }
    }

    fn is_everywhere(&self, limit: &Limit) -> bool {
        let memory = self.lock();
        let on_the_way = memory.get(&limit.key).and_then(|of| of.on_the_way.as_ref());
        on_the_way.is_some_and(|it| it.everywhere.is_some())
    }

    /// What proxies make of what is stored.
    async fn follow(
        &self,
        limit: &Limit,
        filters: &[Filter],
        world: &World,
        mark: &str,
    ) -> Standing {
        let on_the_way = self
            .lock()
            .get(&limit.key)
            .and_then(|of| of.on_the_way.clone());
        let on_the_way = on_the_way.filter(|it| it.mark == mark);
        let no_older_than = match &on_the_way {
            Some(_) => self.pace(&limit.key) / 2,
            None => ASK_SELDOM,
        };
        let said = self.proxies.said(world, no_older_than).await;
        let before = on_the_way.as_ref().map(|it| &it.before);
        match proxies::look(limit, filters, world, &said, before) {
            Seen::Refused(why) => Standing::Refused(why),
            Seen::Waits(why) => match on_the_way {
                // A proxy that is connected, but of which nothing came since, began lately or moved to another istiod.
                None => Standing::InForce("every proxy had it".to_owned()),
                Some(it) => {
                    let time = it.since.elapsed();
                    let hint = if time > PATIENCE { NEVER_ASKED } else { "" };
                    Standing::OnTheWay(format!("{why}{hint}"), time > SAID_AFTER)
                }
            },
            Seen::Everywhere(proxies) => {
                if let Some(it) = &on_the_way {
                    let first = it.everywhere.unwrap_or_else(Instant::now);
                    let settled = first.elapsed() > SETTLES;
                    let mut memory = self.lock();
                    let of = memory.entry(limit.key.clone()).or_default();
                    // Looked at again for a while: Envoy may refuse it yet.
                    of.on_the_way = (first.elapsed() < UNSEEN).then(|| OnTheWay {
                        everywhere: Some(first),
                        ..it.clone()
                    });
                    if !settled {
                        let why = "every proxy has it; whether one refuses it shows in a moment"
                            .to_owned();
                        return Standing::OnTheWay(why, false);
                    }
                }
                Standing::InForce(format!("{proxies} proxies have it"))
            }
            Seen::Unknown(why) => match on_the_way {
                Some(it) if it.since.elapsed() < UNSEEN => Standing::OnTheWay(why, false),
                _ => Standing::InForce(format!("it is not known whether proxies have it: {why}")),
            },
        }
    }

    /// Puts back what was in force before, or nothing, and leaves it so until something else is wanted.
    async fn put_back(
        &self,
        object: &RateLimit,
        limit: &Limit,
        stored: Option<&EnvoyFilter>,
        why: &str,
    ) -> Standing {
        let name = Key::new(&*limit.key.namespace, plan::name(&limit.key.name));
        let newest = self.recent.newest(&name, None);
        let stored = newest.as_deref().or(stored);
        tracing::warn!(rate_limit = %limit.key, why, "a limit is taken back");
        let mut back = match stored {
            Some(stored) => stored.clone(),
            None => return Standing::Refused(why.to_owned()),
        };
        back.metadata.managed_fields = None;
        back.metadata.resource_version = None;
        back.metadata.uid = None;
        back.metadata.creation_timestamp = None;
        back.metadata.generation = None;
        back.spec = plan::back(stored.and_then(note::last_good), &back.spec);
        back.metadata.annotations =
            Note::refused(stored, &mark_of_spec(&object.spec), why).annotations();
        match self.write(&name, &back, stored).await {
            Err(standing) => standing,
            Ok(()) => {
                self.lock().entry(limit.key.clone()).or_default().on_the_way = None;
                Standing::Refused(why.to_owned())
            }
        }
    }
}
