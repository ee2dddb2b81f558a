package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	release "helm.sh/helm/v4/pkg/release/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
)

// removal are the flags of uninstall.
type removal struct {
	version         string
	target          *target
	values          valueFlags
	keepCRD, keepCA bool
	force           bool
	yes, dryRun     bool
	drain, limit    time.Duration
}

func uninstallCommand(version string) *cobra.Command {
	u := &removal{version: version}
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take every pod out of the mesh, and remove Tacit",
		Long: `Takes every pod out of the mesh, and removes all that install has made: rules in pods, the CNI plugin and its
place in the chain on every node, the release, the kinds Mesh, AuthorizationPolicy and
PeerAuthentication that it brought, with all objects of them, the CA. Pods go on: new connections are plaintext, and
those that began before a pod was enrolled were never touched. Connections that go through a proxy get --drain to end; after that they are reset.

--values and --set say how it was installed, if there is no record of that any more; else they are not needed.

A node that is away is not cleaned. The command names the node, and the next tacit uninstall cleans it.
The command names the cluster and asks before it begins. Without a terminal it needs --yes.

It refuses what Argo CD, Flux or another tool has installed, and says in which order to remove that.

Exit codes: 0 nothing is left; 1 something failed, and it may be run again; 2 nodes that are away were not cleaned.`,
		Example: `  tacit uninstall
  tacit uninstall --dry-run
  tacit uninstall --yes --keep-ca`,
		Args: cobra.NoArgs,
	}
	u.target = newTarget(cmd.Flags())
	f := cmd.Flags()
	u.values.add(f)
	f.BoolVar(&u.yes, "yes", false, "do not ask")
	f.BoolVar(&u.dryRun, "dry-run", false, "print what would be done, and change nothing")
	f.BoolVar(&u.keepCRD, "keep-crd", false, "keep the kinds Mesh, AuthorizationPolicy and PeerAuthentication that were installed, and their objects")
	f.BoolVar(&u.keepCA, "keep-ca", false, "keep the keys of the CA, and so the namespace: the next installation has the same roots")
	f.BoolVar(&u.force, "force", false, "do not wait for control to release the pods, for when it is away")
	f.DurationVar(&u.drain, "drain", 30*time.Second, "how long connections through a proxy may take to end")
	f.DurationVar(&u.limit, "timeout", 5*time.Minute, "how long all of it may take")
	cmd.RunE = u.command
	return cmd
}

func (u *removal) command(cmd *cobra.Command, _ []string) error {
	c, err := u.target.connect()
	if err != nil {
		return err
	}
	last, record, err := u.look(cmd.Context(), c)
	if err != nil {
		return err
	}
	if u.dryRun {
		_, err := fmt.Fprintln(cmd.OutOrStdout(), u.plan(c, last != nil))
		return err
	}
	if err := confirm(cmd, u.yes, u.plan(c, last != nil)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), u.limit)
	defer cancel()
	return u.run(ctx, c, newProgress(cmd.OutOrStdout()), last, record)
}

// look finds Helm's record: last is nil if the release is not installed any more. An installation
// of somebody else is an error.
func (u *removal) look(ctx context.Context, c *cluster) (last, record *release.Release, err error) {
	r, err := c.releases()
	if err != nil {
		return nil, nil, err
	}
	if last, err = r.last(); err != nil {
		return nil, nil, err
	}
	if record, err = r.record(); err != nil {
		return nil, nil, err
	}
	there, err := c.installed(ctx)
	if err != nil {
		return nil, nil, err
	}
	if there.foreign(last) {
		o := there.owner()
		return nil, nil, fmt.Errorf("uninstall: %s has installed this, not tacit install: %s", o, o.removal())
	}
	return last, record, nil
}

// plan says what will be done, and where.
func (u *removal) plan(c *cluster, installed bool) string {
	lines := []string{"This removes Tacit from " + c.name + ":"}
	say := func(is bool, what string) {
		if is {
			lines = append(lines, "  - "+what)
		}
	}
	say(installed && !u.force, "every pod leaves the mesh: new connections are plaintext")
	say(true, "agents and proxies end, and every node is cleaned")
	say(installed, "the release "+releaseName+" is removed")
	say(!u.keepCRD, "the kinds Mesh, AuthorizationPolicy and PeerAuthentication that it brought are removed, with all objects of them")
	say(!u.keepCA, "the keys of the CA are destroyed, and namespace "+namespace+" if tacit install made it")
	return strings.Join(lines, "\n")
}

// run does all of it in an order in which every step leaves a cluster that works:
// nobody is captured when the proxies end, no plugin is named when no agent answers.
func (u *removal) run(ctx context.Context, c *cluster, p *progress, last, record *release.Release) error {
	r, err := c.releases()
	if err != nil {
		return err
	}
	ds, err := u.daemonSet(ctx, record)
	if err != nil {
		return err
	}
	before, err := u.release(ctx, c, p, last != nil)
	if err != nil {
		return err
	}
	away, err := u.clean(ctx, c, p, ds)
	if err != nil {
		return err
	}
	p.say("removing release %s", releaseName)
	if err := r.remove(u.limit, len(away) > 0); err != nil {
		return err
	}
	err = u.removeRest(ctx, c, p, ds)
	if u.keepCRD && before != nil { // in any case: the next try would not know it any more
		err = errors.Join(err, c.setEnrollment(ctx, cmp.Or(before.Enrollment, kube.Labeled)))
	}
	if err != nil {
		return err
	}
	return u.finish(ctx, c, p, away)
}

// finish removes the namespace, unless something in it is still needed.
func (u *removal) finish(ctx context.Context, c *cluster, p *progress, away []string) (err error) {
	if len(away) > 0 {
		p.say("uninstalled, but for %s: namespace %s stays, with the record of the release, for the next tacit uninstall", strings.Join(away, ", "), namespace)
		return lacking
	}
	if u.keepCA {
		err = c.restoreNamespace(ctx)
	} else {
		err = c.removeNamespace(ctx, p)
	}
	if err == nil {
		p.say("uninstalled")
	}
	return err
}

// daemonSet is that of the release, or, if there is no record of one, that of the chart.
func (u *removal) daemonSet(ctx context.Context, record *release.Release) (*appsv1.DaemonSet, error) {
	manifest := ""
	if record != nil {
		manifest = record.Manifest
	} else {
		charted, err := openChart(u.version)
		if err != nil {
			return nil, err
		}
		vals, err := u.values.merge()
		if err != nil {
			return nil, err
		}
		if manifest, err = render(ctx, charted, vals); err != nil {
			return nil, err
		}
	}
	objects, err := decode(manifest)
	if err != nil {
		return nil, err
	}
	return daemonSetOf(objects)
}

// release has control release every pod. What is still open after the time to drain
// is reset by the end of the proxies.
func (u *removal) release(ctx context.Context, c *cluster, p *progress, installed bool) (before *kube.MeshSpec, err error) {
	if u.force || !installed {
		return nil, nil
	}
	p.say("taking every pod out of the mesh")
	if before, err = c.enrollNobody(ctx, p); err != nil {
		return nil, fmt.Errorf("%w (--force goes on without control)", err)
	}
	left := int32(1) // pods that are enrolled, or may be
	drain, cancel := context.WithTimeout(ctx, u.drain)
	defer cancel()
	err = p.await(drain, func(ctx context.Context) (string, error) {
		enrolled, missing, err := c.inMesh(ctx)
		if err == nil { // an answer that the end of the time cuts off says nothing
			left = enrolled
		}
		return missing, err
	})
	if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		return before, err
	}
	if left > 0 {
		return before, fmt.Errorf("%w: see the logs of %s, or give --force", err, controlName)
	}
	p.say("connections that go through a proxy end now")
	return before, nil
}

// clean ends agents and proxies, and then removes what they have left on nodes, but for
// those that are away.
func (u *removal) clean(ctx context.Context, c *cluster, p *progress, ds *appsv1.DaemonSet) (away []string, err error) {
	sets := c.client.AppsV1().DaemonSets(namespace)
	policy := metav1.DeletePropagationBackground // a node that is away would hold up the other one
	if err := sets.Delete(ctx, nodesName, metav1.DeleteOptions{PropagationPolicy: &policy}); err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("remove DaemonSet %s: %w", nodesName, err)
	}
	nodes, gone, err := c.nodes(ctx, ds)
	if err != nil {
		return nil, err
	}
	if err := c.awaitEnd(ctx, p, nodesName, gone); err != nil {
		return nil, err
	}
	p.say("cleaning %d nodes", len(nodes))
	return sortedNodes(gone), u.sweep(ctx, c, p, ds, nodes, gone)
}

// awaitEnd waits until no pod of name is left. Those of a node that is away are let go
// of: nobody there ends them, and everything else would wait.
func (c *cluster) awaitEnd(ctx context.Context, p *progress, name string, away map[string]string) error {
	return p.await(ctx, func(ctx context.Context) (string, error) {
		pods, err := c.podsOf(ctx, name)
		for _, pod := range pods {
			if away[pod.Spec.NodeName] != "" {
				now := int64(0)
				err = errors.Join(err, c.client.CoreV1().Pods(namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}))
			}
		}
		if len(pods) == 0 {
			return "", err
		}
		return fmt.Sprintf("the end of %s: %d pods left", name, len(pods)), err
	})
}

func (u *removal) sweep(ctx context.Context, c *cluster, p *progress, ds *appsv1.DaemonSet, nodes []string, away map[string]string) error {
	if _, err := c.ensureNamespace(ctx); err != nil {
		return err
	}
	found, err := c.visitNodes(ctx, ds, sweeping(ds), nodes)
	if err != nil {
		return fmt.Errorf("clean the nodes: %w", err)
	}
	r := &report{}
	for _, node := range nodes {
		r.add(node, found[node]...)
	}
	for _, node := range sortedNodes(away) {
		p.say("node %s is not ready, and was not cleaned: run tacit uninstall again when it is back", node)
	}
	if n := r.lacking(); n > 0 {
		r.print(p.out)
		return fmt.Errorf("clean the nodes: %d things are left: run tacit uninstall again", n)
	}
	return nil
}

// removeRest removes what control has made by itself, when it can make it no more.
func (u *removal) removeRest(ctx context.Context, c *cluster, p *progress, ds *appsv1.DaemonSet) error {
	_, away, err := c.nodes(ctx, ds)
	if err != nil {
		return err
	}
	if err := c.awaitEnd(ctx, p, controlName, away); err != nil {
		return err
	}
	if !u.keepCRD {
		if err := c.removeKinds(ctx, p); err != nil {
			return err
		}
	}
	core := c.client.CoreV1()
	var errs []error
	gone := func(err error) {
		if !apierrors.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	gone(core.ConfigMaps(namespace).Delete(ctx, kube.BundleMap, metav1.DeleteOptions{}))
	gone(core.ConfigMaps(namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: kube.LabelCaptured}))
	gone(c.client.CoordinationV1().Leases(namespace).Delete(ctx, controlName, metav1.DeleteOptions{}))
	if !u.keepCA {
		gone(core.Secrets(namespace).Delete(ctx, "tacit-ca", metav1.DeleteOptions{}))
	}
	return errors.Join(append(errs, c.forgetPods(ctx))...)
}

// forgetPods removes what control has said of pods, and did not take back: it was away, or
// waited for a node that is.
func (c *cluster) forgetPods(ctx context.Context) error {
	pods, err := c.client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var said kube.View
	for _, p := range pods.Items {
		if slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == kube.ConditionProtected }) {
			said.Pods = append(said.Pods, kube.PodView{UID: string(p.UID), Namespace: p.Namespace, Name: p.Name})
		}
	}
	return kube.NewDisplay(kube.Client{Interface: c.client}, 0, nil).Show(ctx, said)
}
