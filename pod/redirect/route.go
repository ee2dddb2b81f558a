package redirect

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

const (
	// replyTable routes everything to this host itself. 0x7ac1.
	replyTable = 31425
	// replyPriority is after the table local (0), before main (32766).
	replyPriority = 100
	// loopback is the index of lo in every namespace.
	loopback = 1
)

// inside gives f a netlink handle of the namespace, and the families it has.
func inside(ns *netns.NS, f func(*netlink.Handle, []int) error) error {
	families := []int{unix.AF_INET}
	six, err := ns.HasIPv6()
	if err != nil {
		return fmt.Errorf("look for IPv6: %w", err)
	}
	if six {
		families = append(families, unix.AF_INET6)
	}
	var h *netlink.Handle
	err = ns.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if h != nil {
		defer h.Close()
	}
	if err != nil {
		return fmt.Errorf("netlink in namespace %d: %w", ns.Inode(), err)
	}
	return f(h, families)
}

func addReplyRoutes(ns *netns.NS) error {
	return inside(ns, func(h *netlink.Handle, families []int) error {
		links, err := upLinks(h)
		if err != nil {
			return err
		}
		for _, f := range families {
			for _, r := range replyRoutes(f, links) {
				if err := h.RouteReplace(r); err != nil {
					return fmt.Errorf("route local default dev %d table %d: %w", r.LinkIndex, replyTable, err)
				}
			}
			for _, mark := range routedMarks {
				if err := h.RuleAdd(replyRule(f, mark)); err != nil && !errors.Is(err, unix.EEXIST) {
					return fmt.Errorf("ip rule fwmark %#x lookup %d: %w", mark, replyTable, err)
				}
			}
		}
		return nil
	})
}

func delReplyRoutes(ns *netns.NS) error {
	return inside(ns, func(h *netlink.Handle, families []int) error {
		var errs []error
		for _, f := range families {
			rules, err := replyRules(h, f)
			errs = append(errs, err)
			for _, r := range rules {
				errs = append(errs, unlessGone(h.RuleDel(&r)))
			}
			routes, err := h.RouteListFiltered(f, &netlink.Route{Table: replyTable}, netlink.RT_FILTER_TABLE)
			errs = append(errs, err)
			for _, r := range routes {
				errs = append(errs, unlessGone(h.RouteDel(&r)))
			}
		}
		return errors.Join(errs...)
	})
}

func checkReplyRoutes(ns *netns.NS) error {
	return inside(ns, func(h *netlink.Handle, families []int) error {
		links, err := upLinks(h)
		if err != nil {
			return err
		}
		for _, f := range families {
			rules, err := replyRules(h, f)
			if err != nil {
				return err
			}
			routes, err := h.RouteListFiltered(f, &netlink.Route{Table: replyTable}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return fmt.Errorf("read routes of table %d: %w", replyTable, err)
			}
			complete := !slices.ContainsFunc(links, func(link int) bool {
				return !slices.ContainsFunc(routes, func(r netlink.Route) bool { return isReplyRoute(r, link) })
			})
			if len(rules) != len(routedMarks) || !complete {
				return fmt.Errorf("namespace %d, %d ip rules to table %d and %d routes in it: %w",
					ns.Inode(), len(rules), replyTable, len(routes), ErrRules)
			}
		}
		return nil
	})
}

// replyRules are the rules of our priority that are ours.
func replyRules(h *netlink.Handle, family int) ([]netlink.Rule, error) {
	all, err := h.RuleList(family)
	if err != nil {
		return nil, fmt.Errorf("read ip rules: %w", err)
	}
	return slices.DeleteFunc(all, func(r netlink.Rule) bool {
		return r.Table != replyTable || r.Priority != replyPriority || !slices.Contains(routedMarks, r.Mark)
	}), nil
}

// routedMarks are on what is led to the proxy over lo.
var routedMarks = []uint32{mesh.ReplyMark, leadMark}

func replyRule(family int, mark uint32) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Mark = family, replyPriority, replyTable, mark
	return r
}

// replyRoutes deliver everything here, over lo in any case: a route to this host itself
// only has the name of the interface. lo comes first.
func replyRoutes(family int, links []int) []*netlink.Route {
	var all []*netlink.Route
	for i, link := range links {
		r := &netlink.Route{LinkIndex: link, Table: replyTable, Type: unix.RTN_LOCAL, Family: family, Priority: i + 1}
		if family == unix.AF_INET {
			r.Scope = unix.RT_SCOPE_HOST
			r.Dst = &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		} else {
			r.Dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		all = append(all, r)
	}
	return all
}

func isReplyRoute(r netlink.Route, link int) bool {
	ones := 0
	if r.Dst != nil {
		ones, _ = r.Dst.Mask.Size()
	}
	return r.LinkIndex == link && r.Type == unix.RTN_LOCAL && ones == 0
}

// unlessGone is err, but nil if it says that there was nothing to delete.
func unlessGone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
