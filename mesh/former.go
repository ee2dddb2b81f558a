package mesh

import "time"

// former has what led to pods and services and leads nowhere now, with the time since when.
// It forgets without looking: what was noted lies in recent or, after formerFor at the
// latest, in earlier, which is given up as a whole when recent becomes that.
type former struct {
	recent, earlier trie[destination, time.Time]
	// since is when recent began.
	since time.Time
}

// note takes over what has led to something in w or the World before, or does so now.
func (f *former) note(w *World, touched map[destination]bool, now time.Time) {
	if now.Sub(f.since) >= formerFor {
		f.recent, f.earlier, f.since = trie[destination, time.Time]{}, f.recent, now
	}
	for to := range touched {
		if w.leads(to) {
			f.recent.del(w.era, to)
			f.earlier.del(w.era, to)
		} else {
			f.recent.set(w.era, to, now)
		}
	}
}

func (f *former) has(to destination, now time.Time) bool {
	for _, t := range []*trie[destination, time.Time]{&f.recent, &f.earlier} {
		if since, ok := t.get(to); ok && now.Sub(since) < formerFor {
			return true
		}
	}
	return false
}
